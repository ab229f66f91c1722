"""Requirements of manifests, and what is said about those that nothing meets."""

import pytest

from dovetail.errors import PluginLoadError
from dovetail.plugins.host import PluginHost
from dovetail.plugins.requirements import explain_unmet, pip_install, unmet, unmet_by
from dovetail.testing.fake_plugins import install


def distribution(site, name, version="1.0", requires=()):
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("requirement", "met"),
    [
        ("quill", True),
        ("Quill>=1.5", True),
        ("quill==1.5.*", True),
        ("quill<2", True),
        ("quill>=2", False),
        ("no-such-distribution", False),
        ("no-such-distribution; python_version<'3'", True),
        ("no-such-distribution; extra=='all'", True),
    ],
)
def test_unmet(site, requirement, met):
    distribution(site, "quill", "1.5.2")
    assert (unmet([requirement]) == []) is met


def test_what_a_distribution_lacks_of_its_dependencies(site):
    distribution(site, "scribe", requires=["quill>=2; python_version>'3'", "ink", "paper; extra=='full'"])
    distribution(site, "ink")
    assert unmet_by("scribe") == ["quill>=2"]
    assert unmet_by("nobody") == []


def test_words(site):
    distribution(site, "quill", "1.5.2")
    assert explain_unmet(["quill"]) == ""
    assert explain_unmet(["quill>=2", "sand"]) == (
        "requires quill>=2, and 1.5.2 is installed, sand, which is not installed; run: pip install 'quill>=2' 'sand'"
    )
    assert explain_unmet(["quill>=2", "sand"], "scribe[full]").endswith("; run: pip install 'scribe[full]'")
    assert pip_install(["a>1"]) == "pip install 'a>1'"


SOURCE = """
from dovetail import hookimpl
from dovetail.plugins.manifest import QuantManifest

@hookimpl
def dovetail_register_quant_methods(register):
    register(QuantManifest(name="q", summary="", requires={requires}, extra={extra!r}), "json:loads")
"""


def discover(site, requires, extra=""):
    install(site, "wants", SOURCE.format(requires=requires, extra=extra))
    discovery = PluginHost().discover(warn=False)
    return discovery.registries, next(plugin for plugin in discovery.plugins if plugin.name == "wants")


def test_missing_requirement_is_a_warning_and_refuses_the_target(site):
    registries, status = discover(site, ("quill>=2",))
    what = "requires quill>=2, which is not installed; run: pip install 'quill>=2'."
    assert status.state == "loaded"
    assert status.warnings == (f"'q' cannot be used: it {what}",)
    with pytest.raises(PluginLoadError) as caught:
        registries.quant.get("q").load()
    assert str(caught.value) == f"'q' of plugin 'wants' (dist-wants 1.0) {what}"


def test_missing_extra_is_no_warning(site):
    registries, status = discover(site, ("quill>=2",), "full")
    assert (status.state, status.warnings) == ("loaded", ())
    with pytest.raises(
        PluginLoadError, match=r"quill>=2, which is not installed; run: pip install 'dist-wants\[full\]'"
    ):
        registries.quant.get("q").load()


def test_met_requirement(site):
    distribution(site, "quill", "2.1")
    registries, status = discover(site, ("quill>=2",))
    assert status.warnings == ()
    assert registries.quant.get("q").load()


def test_malformed_requirement(site):
    _, status = discover(site, ("two words",))
    assert status.state == "quarantined"
    assert "'two words'" in status.error
    assert "'fancy>=2'" in status.error


def test_import_error_names_the_unmet_dependency_of_the_distribution(site):
    distribution(site, "scribe", requires=["quill>=2"])
    source = "import quill_of_the_swan"
    (site / "scribe_plugin.py").write_text(source)
    (site / "scribe-1.0.dist-info/entry_points.txt").write_text("[dovetail]\nscribe = scribe_plugin\n")
    (status,) = [p for p in PluginHost().discover(warn=False).plugins if p.name == "scribe"]
    assert "No module named 'quill_of_the_swan'" in status.error
    assert status.remedy.startswith("Install what scribe depends on: pip install 'quill>=2'.")


def test_import_error_of_its_own_module_says_reinstall(site):
    install(site, "torn", "import fake_torn_dist_torn.missing")
    (status,) = [p for p in PluginHost().discover(warn=False).plugins if p.name == "torn"]
    assert "pip install --force-reinstall dist-torn" in status.remedy
