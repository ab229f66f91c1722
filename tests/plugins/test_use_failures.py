"""What can be wrong with a plugin once it is used: lies, and code that breaks while loading or running.

Each is an installed package that was asked for by name and by option, so that nothing runs, or what runs ends; the
message names plugin, distribution, version, cause and remedy.
"""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

PLUGIN = """
from dovetail import hookimpl
from dovetail.plugins.manifest import *

@hookimpl
def dovetail_register_{hook}(register):
    register({manifest}, "{target}")
"""
HOOKS = {
    "attention": ("attention_backends", "AttentionManifest", {"device_types": ("cpu",), "dtypes": ("float32",)}),
    "platform": (
        "platforms",
        "PlatformManifest",
        {"device_type": "cpu", "dtypes": ("float32",), "attention": ("reference",)},
    ),
    "quantization": ("quant_methods", "QuantManifest", {"on_load": True}),
    "speculative-config": ("spec_decoders", "SpecDecoderManifest", {"defaults": {"num_speculative_tokens": 2}}),
    "model": ("models", "ModelManifest", {"architectures": ("LlamaForCausalLM",), "priority": 9}),
}
ATTENTION = """
from dovetail.errors import ConfigError
from dovetail.platforms.cpu.reference_attention import ReferenceAttention

class Part(ReferenceAttention):
"""
PLATFORM = """
import torch
from dovetail.ops import reference
from dovetail.testing.platforms import ReferencePlatform

class Part(ReferencePlatform):
"""
QUANT = """
import torch
from dovetail.contracts.quant import QuantMethod, TensorSpec
from dovetail.layers.linear import Unquantized

calls = 0

class Part(Unquantized):
"""
DECODER = """
import torch
from dovetail.contracts.specdec import Drafts, SpecDecoder

class Part(SpecDecoder):
    def __init__(self, config, device): self.config = config
    def release(self, slots): pass
"""


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to fail, the option that chooses it, and what is said of it."""

    option: str
    source: str
    says: tuple[str, ...]
    claims: dict = dataclasses.field(default_factory=dict)
    requires: tuple[str, ...] = ()


OTHER = {
    "attention": "or choose another --attention.",
    "platform": "or choose another --platform.",
    "quantization": "or choose another --quantization.",
    "speculative-config": "leave out --speculative-config.",
    "model": "or serve another model.",
}
LOADING = {
    "target-import-error": Mode(
        "attention",
        "import libquill",
        ("No module named 'libquill'.", "Install what dist-target-import-error depends on: pip install 'libquill>=2'."),
        requires=("libquill>=2",),
    ),
    "no-such-class": Mode(
        "platform",
        "class Other: pass",
        ("has no attribute 'Part'.", "Install a release of dist-no-such-class that repairs this"),
    ),
    "missing-methods": Mode(
        "speculative-config",
        "from dovetail.contracts.specdec import SpecDecoder\nclass Part(SpecDecoder): pass",
        ("leaves methods of its contract undefined: __init__, propose, release.",),
    ),
    "broken-constructor": Mode(
        "attention",
        ATTENTION + "    def __init__(self, **kwargs): raise ValueError('7 beads')",
        ("failed while loading: ValueError: 7 beads. It stood at ", "impl.py:6 in __init__.", OTHER["attention"]),
    ),
    "broken-allocate": Mode(
        "attention",
        ATTENTION + "    def allocate(self, spec, num_blocks): raise MemoryError('no room')",
        ("failed while loading: MemoryError: no room.", OTHER["attention"]),
    ),
    "deliberate-refusal": Mode(
        "attention",
        ATTENTION + "    def __init__(self, **kwargs): raise ConfigError('Set --block-size 17.')",
        ("Set --block-size 17. (Raised by plugin 'deliberate-refusal' (dist-deliberate-refusal 1.2.3).)",),
    ),
    "broken-compile": Mode(
        "platform",
        PLATFORM + "    def compile(self, step, bucket): raise RuntimeError('no graph')",
        ("failed while loading: RuntimeError: no graph.", OTHER["platform"]),
    ),
    "broken-prepare": Mode(
        "quantization",
        QUANT + "    def prepare(self, tensors, ops, dtype): raise KeyError('scale')",
        ("failed while loading: KeyError: 'scale'.", OTHER["quantization"]),
    ),
    "lying-attention": Mode(
        "attention",
        ATTENTION + "    def forward(self, q, *rest): return 0 * super().forward(q, *rest)",
        ("The self-check of ", "claims head size", "is off by 1 where 0.001 is allowed.", "Choose another --attention"),
    ),
    "lying-device": Mode(
        "platform",
        PLATFORM + "    device = torch.device('meta')",
        ("claims device type 'cpu', and runs on meta.", "Choose another --platform, and report this"),
    ),
    "lying-ops": Mode(
        "platform",
        PLATFORM + "    def ops(self, dtype): return {'linear': reference.linear}",
        ("it overrides linear, which its manifest does not claim.", "Choose another --platform"),
    ),
    "lying-on-load": Mode(
        "quantization",
        QUANT
        + """
    def tensors(self, in_features, out_features, dtype):
        scale = TensorSpec(shape=(out_features,), dtype=torch.float32)
        return {**super().tensors(in_features, out_features, dtype), "weight_scale": scale}
""",
        ("missing: ", "weight_scale", "number format 'lying-on-load' of plugin 'lying-on-load'", "report it to them"),
    ),
}
RUNNING = {
    "crumbling-attention": Mode(
        "attention",
        ATTENTION
        + """
    def build_metadata(self, step, group):
        if step.max_seq_len > 30:
            raise IndexError("page 2 is gone")
        return super().build_metadata(step, group)
""",
        ("failed while running a step: IndexError: page 2 is gone.", "in build_metadata.", OTHER["attention"]),
    ),
    "crumbling-op": Mode(
        "platform",
        PLATFORM
        + """
    def ops(self, dtype):
        def embedding(ids, table):
            if ids.any():
                raise RuntimeError("table lost")
            return reference.embedding(ids, table)
        return {"embedding": embedding}
""",
        ("failed while running a step: RuntimeError: table lost.", OTHER["platform"]),
        {"ops": frozenset({"embedding"})},
    ),
    "crumbling-quant": Mode(
        "quantization",
        QUANT
        + """
    def apply(self, *arguments):
        global calls
        calls += 1
        if calls > 400:
            raise ArithmeticError("overflow")
        return super().apply(*arguments)
""",
        ("failed while running a step: ArithmeticError: overflow.", OTHER["quantization"]),
    ),
    "crumbling-decoder": Mode(
        "speculative-config",
        DECODER + "    def propose(self, state): raise LookupError('empty trie')",
        ("failed while running a step: LookupError: empty trie.", OTHER["speculative-config"]),
    ),
    "secret-probabilities": Mode(
        "speculative-config",
        DECODER
        + """
    def propose(self, state):
        shape = (len(state.slots), self.config.num_speculative_tokens, self.config.vocab_size)
        return Drafts(token_ids=[[] for _ in state.slots], probs=torch.zeros(shape))
""",
        ("returned probabilities, and its manifest says probabilities=False.", OTHER["speculative-config"]),
    ),
    "crumbling-model": Mode(
        "model",
        """
from dovetail_models.llama import Llama

class Part(Llama):
    asked = 0

    def logits(self, hidden):
        self.asked += 1
        if self.asked > 20:
            raise ZeroDivisionError("norm")
        return super().logits(hidden)
""",
        ("failed while running a step: ZeroDivisionError: norm.", OTHER["model"]),
    ),
}
PROMPT = "The king said to the fox: “Give me the ring.” The fox said to the king: “"


def packages(package, modes):
    for name, mode in modes.items():
        folder = name.replace("-", "_")
        hook, manifest, fields = HOOKS[mode.option]
        arguments = ", ".join(f"{k}={v!r}" for k, v in {"name": name, "summary": "", **fields, **mode.claims}.items())
        if mode.option in ("attention", "platform"):
            arguments += ", verify=True" if mode.option == "attention" else ""
        plugin = PLUGIN.format(hook=hook, manifest=f"{manifest}({arguments})", target=f"{folder}.impl:Part")
        files = {f"{folder}/__init__.py": "", f"{folder}/plugin.py": plugin, f"{folder}/impl.py": mode.source}
        plugins = {name: f"{folder}.plugin"}
        yield package(name=f"dist-{name}", version="1.2.3", files=files, plugins=plugins, requires=mode.requires)


def command(name, mode, small):
    """Everything that is asked for in so many words."""
    chosen = {
        "speculative-config": ["--speculative-config", f'{{"method": "{name}"}}', "--attention", "reference"],
        "model": [],
    }.get(mode.option, [f"--{mode.option}", name])
    generate = ["generate", "--prompt", PROMPT, "--max-tokens", "48", "--dtype", "float32"]
    return ["--plugins", f"models,{name}", *generate, *small, *chosen]


@pytest.fixture(scope="module")
def site(install, package):
    return install([*packages(package, LOADING), *packages(package, RUNNING)])


@pytest.fixture(scope="module")
def ran(site, small):
    """Every way to fail, one after the other in one process."""
    return site.dovetail_all({name: command(name, mode, small) for name, mode in {**LOADING, **RUNNING}.items()})


@pytest.mark.parametrize("name", [*LOADING, *RUNNING])
def test_failure_names_its_owner_the_cause_and_the_remedy(ran, name):
    mode, done = {**LOADING, **RUNNING}[name], ran[name]
    assert done.code != 0
    message = " ".join(done.err.split())
    assert message.startswith("error: ")
    assert f"plugin '{name}' (dist-{name} 1.2.3)" in message
    for part in mode.says:
        assert part in message
    assert "Traceback" not in message
    assert done.out.strip() == "" or name in RUNNING


def test_merely_discovered_and_broken_it_is_passed_over(install, package):
    """A platform that would come first, if it could be imported."""
    mode = dataclasses.replace(LOADING["no-such-class"], claims={"priority": 50})
    ran = install(list(packages(package, {"bright": mode}))).dovetail("explain", "--json")
    assert ran.code == 0, ran.err
    (platform,) = [part for part in json.loads(ran.out)["parts"] if part["part"] == "platform"]
    assert platform["chosen"]["name"] == "cpu"
    said = " ".join(ran.err.split())
    assert "'bright' of plugin 'bright' (dist-bright 1.2.3) cannot be imported from bright.impl:Part: " in said
    assert said.endswith("or report it to its authors. It is passed over.")


MARK = """
import os, pathlib
with (pathlib.Path(__file__).parents[1] / "importers").open("a") as file:
    print(os.getpid(), file=file)
"""


@pytest.fixture(scope="module")
def server(install, package):
    """On a plugin that will crumble; beside it, one that is broken."""
    name = "crumbling-attention"
    (crumbling,) = packages(package, {name: RUNNING[name]})
    plugin = "crumbling_attention/plugin.py"
    marked = dataclasses.replace(crumbling, files={**crumbling.files, plugin: MARK + crumbling.files[plugin]})
    broken = package(name="dist-lost", version="0.7", files={"lost.py": "import libnothing"}, plugins={"lost": "lost"})
    site = install([marked, broken])
    with site.serving("--attention", name, "--dtype", "float32") as running:
        yield running


@pytest.fixture
def importers(server):
    """Processes that imported the plugin module."""
    return (server.log.parent / "importers").read_text().split()


def test_server_runs_beside_a_quarantined_plugin_and_tells_of_it(server):
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 200
    (lost,) = [plugin for plugin in health.json()["plugins"] if plugin["state"] != "loaded"]
    assert (lost["name"], lost["distribution"], lost["version"]) == ("lost", "dist-lost", "0.7")
    assert lost["state"] == "quarantined"
    assert lost["error"] == "ModuleNotFoundError: No module named 'libnothing'."
    assert lost["remedy"].endswith("Or leave it out with DOVETAIL_DISABLE_PLUGINS=lost.")
    metrics = httpx.get(f"{server.url}/metrics").text
    labels = 'distribution="dist-lost",plugin="lost",state="quarantined",version="0.7"'
    assert f"dovetail:plugin_info{{{labels}}} 1.0" in metrics
    assert "dovetail:plugins_failed 1.0" in metrics
    assert "The plugin 'lost' (dist-lost 0.7) failed to load and is left out: ModuleNotF" in server.log.read_text()


def test_engine_process_discovers_nothing_itself(server, importers):
    """The plugin module was imported by the server alone, though the engine runs what it registered."""
    assert importers == [str(server.process.pid)]
    body = {"prompt": "The", "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_death_of_a_server_names_the_plugin(server):
    """A request gets an error, ``/health`` and the log tell whose fault it was, and the server ends."""
    name = "crumbling-attention"
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 64}, timeout=60)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_dead"
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    for part in (f"plugin '{name}' (dist-{name} 1.2.3)", *RUNNING[name].says):
        assert part in health.json()["cause"]
    assert server.process.wait(30) == 1
    log = server.log.read_text()
    assert health.json()["cause"] in log
    assert "Traceback" in log
