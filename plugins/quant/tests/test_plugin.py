from dovetail.plugins.host import PluginHost


def test_provides_number_formats():
    (status,) = [p for p in PluginHost().discover().plugins if p.name == "quant"]
    outcome = (status.distribution, status.state, status.error, {k: sorted(v) for k, v in status.provides.items()})
    names = ["awq", "fp8", "fp8-w8a8", "gptq", "int8", "int8-w8a8"]
    assert outcome == ("dovetail-quant", "loaded", None, {"quant": names})
