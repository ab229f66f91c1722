from dovetail.plugins.host import PluginHost


def test_loads_and_provides_nothing_yet():
    (status,) = [p for p in PluginHost().discover().plugins if p.name == "specdec"]
    outcome = (status.distribution, status.state, status.error, status.provides)
    assert outcome == ("dovetail-specdec", "loaded", None, {})
