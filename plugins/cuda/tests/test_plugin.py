from dovetail.plugins.host import PluginHost


def test_provides_a_platform_and_its_attention():
    (status,) = [p for p in PluginHost().discover().plugins if p.name == "cuda"]
    assert (status.distribution, status.state, status.error) == ("dovetail-cuda", "loaded", None)
    assert {kind: list(names) for kind, names in status.provides.items()} == {
        "platforms": ["cuda"],
        "attention": ["triton", "cudnn"],
    }
