"""Whose fault an exception is, and what its message says."""

from types import SimpleNamespace

import pytest

from dovetail.config import Selection
from dovetail.errors import ConfigError, PluginRunError
from dovetail.plugins.blame import blaming, find


def part(target, plugin):
    name = plugin.removesuffix("s")
    return Selection(name=name, target=target, distribution=f"dist-{plugin}", version="2.1", why="", plugin=plugin)


CONFIG = SimpleNamespace(
    platform=part("abacus.chip.platform:Abacus", "abacuses"),
    attention=part("abacus.attention:Beads", "abacuses"),
    model=part("zoo.model:Zoo", "zoos"),
    quant=part("dovetail.layers.linear:Unquantized", "builtin"),
    spec_decoder=None,
    draft=SimpleNamespace(model=part("dwarf.model:Dwarf", "dwarfs"), quant=part("halves.format:Half", "halves")),
)


def code(module, body):
    """A function ``run(then)`` that lives in a module of this name."""
    namespace = {"__name__": module}
    exec(f"def run(then=None):\n    {body}", namespace)
    return namespace["run"]


def fail(outer, error="ValueError('7 beads')"):
    """``outer`` calls code that raises in the core."""
    core = code("dovetail.layers.linear", f"raise {error}")
    return lambda: outer(core)


def blamed(run):
    with pytest.raises(PluginRunError) as caught, blaming(CONFIG, "running a step", PluginRunError):
        run()
    return str(caught.value)


def test_the_deepest_plugin_frame_is_to_blame():
    model = code("zoo.model", "then()")
    beads = code("abacus.attention", "raise ValueError('7 beads')")
    said = blamed(lambda: model(beads))
    assert said.startswith(
        "'abacuse' of plugin 'abacuses' (dist-abacuses 2.1) failed while running a step: ValueError: 7 beads. "
    )
    assert "It stood at <string>:2 in run. " in said
    assert said.endswith(
        "Install a release of dist-abacuses that repairs this, or report it to its authors, or choose another "
        "--attention."
    )


def test_a_draft_models_parts_are_to_blame_as_well():
    choices = {"dwarf.model": "draft with another model", "halves.scale": "draft with another checkpoint"}
    for module, choice in choices.items():
        assert blamed(code(module, "raise ValueError('7')")).endswith(f", or {choice}.")


def test_the_module_decides_between_parts_of_one_package():
    for module, option in (
        ("abacus.chip.kernels", "--platform"),
        ("abacus.chip.platform", "--platform"),
        ("abacus.attention", "--attention"),
    ):
        assert option in blamed(code(module, "raise ValueError('x')")), module


def test_a_plugin_is_blamed_for_what_it_calls_in_the_core():
    assert "'zoo' of plugin 'zoos'" in blamed(fail(code("zoo.other", "then()")))


def test_nobody_is_blamed_for_the_cores_own_failure():
    with pytest.raises(ValueError, match=r"^7 beads$"), blaming(CONFIG, "loading", PluginRunError):
        fail(lambda core: core())()


def test_deliberate_error_keeps_type_and_text_and_gains_the_owner():
    namespace = {"__name__": "zoo.model", "ConfigError": ConfigError}
    exec("def run(): raise ConfigError('rope 9 is unknown.')", namespace)
    with pytest.raises(ConfigError) as caught, blaming(CONFIG, "loading", PluginRunError):
        namespace["run"]()
    assert str(caught.value) == "rope 9 is unknown. (Raised by plugin 'zoos' (dist-zoos 2.1).)"


def test_deliberate_error_of_the_core_is_left_alone():
    namespace = {"__name__": "dovetail.kv.pool", "ConfigError": ConfigError}
    exec("def run(): raise ConfigError('no room.')", namespace)
    model = code("zoo.model", "then()")
    with pytest.raises(ConfigError, match=r"^no room\.$"), blaming(CONFIG, "loading", PluginRunError):
        model(namespace["run"])


def test_exit_does_not_end_the_process_silently():
    assert "SystemExit: 3." in blamed(code("zoo.model", "raise SystemExit(3)"))


def test_nothing_of_a_candidate_on_the_stack():
    with pytest.raises(ValueError) as caught:
        code("elsewhere", "raise ValueError")()
    assert find(caught.value, {"model": CONFIG.model}) is None
