"""The entry point of dovetail-specdec."""

from dovetail.plugins.host import PluginHost


def test_registers_its_decoders():
    host = PluginHost().discover()
    (status,) = [p for p in host.plugins if p.name == "specdec"]
    outcome = (status.distribution, status.state, status.error, status.provides)
    assert outcome == ("dovetail-specdec", "loaded", None, {"spec_decoders": ("ngram", "draft_model")})
    entries = host.registries.spec_decoders.entries
    assert [entries[name].load().__name__ for name in ("ngram", "draft_model")] == ["NgramDecoder", "DraftModelDecoder"]
