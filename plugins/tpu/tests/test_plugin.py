from dovetail.plugins.host import PluginHost


def test_loads_and_provides_nothing_yet():
    (status,) = [p for p in PluginHost().discover().plugins if p.name == "tpu"]
    assert (status.distribution, status.state, status.error, status.provides) == ("dovetail-tpu", "loaded", None, {})
