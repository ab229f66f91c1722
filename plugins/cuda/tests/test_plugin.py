import tomllib
from pathlib import Path

from dovetail.plugins.host import PluginHost
from dovetail_cuda.plugin import CUDNN, TRITON


def test_provides_a_platform_and_its_attention():
    (status,) = [p for p in PluginHost().discover().plugins if p.name == "cuda"]
    assert (status.distribution, status.state, status.error) == ("dovetail-cuda", "loaded", None)
    assert {kind: list(names) for kind, names in status.provides.items()} == {
        "platforms": ["cuda"],
        "attention": ["triton", "cudnn"],
    }


def test_the_extra_brings_all_but_what_builds_of_torch_bring():
    """They bring the Triton that fits them; a newer one that pip finds need not."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = CUDNN[len(TRITON) :]
    assert project["optional-dependencies"] == {"cudnn": [*extra]}
    assert not any("triton" in dependency for dependency in project["dependencies"])
