"""The resolver: each choice, each refusal with its remedy, and the explanation."""

import dataclasses
import json
import logging
import sys
import time

import msgspec
import pytest
import torch

from dovetail.config import EngineConfig
from dovetail.contracts.attention import AttentionBackend, AttentionSpec
from dovetail.contracts.model import Model, ModelFacts
from dovetail.contracts.platform import Platform, Probe
from dovetail.contracts.quant import QuantMethod
from dovetail.contracts.specdec import SpecDecoder
from dovetail.errors import ConfigError, PluginLoadError, ResolutionError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import (
    AttentionManifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)
from dovetail.plugins.registry import Entry, PluginStatus, Registries
from dovetail.resolver import explain, resolve


def concrete(base, **members):
    """A class that defines every abstract method of a contract, so that it can stand for an implementation."""
    abstract = {name: lambda *args, **kwargs: None for name in base.__abstractmethods__}
    return type(f"Fake{base.__name__}", (base,), abstract | members)


def chip(available=True, dtype=torch.bfloat16, reason="no such device; plug one in"):
    return concrete(
        Platform,
        probe=classmethod(lambda cls: Probe(available=available, reason="" if available else reason)),
        default_dtype=classmethod(lambda cls, checkpoint: dtype),
    )


Chip = chip()
Missing = chip(available=False)
Float = chip(dtype=torch.float32)
Odd = chip(dtype=torch.float64)
Incomplete = type("Incomplete", (Platform,), {"probe": classmethod(lambda cls: Probe(available=True))})
Attention = concrete(AttentionBackend)
Speculator = concrete(SpecDecoder)
Quant = concrete(QuantMethod, recognises=classmethod(lambda cls, config: config.get("bits") == 4))
NotAModel = object


class FragileQuant(Quant):
    @classmethod
    def recognises(cls, config):
        if config["bits"] is None:
            raise ConfigError("no bits are unheard of.")
        return sys.exit(4) if config["bits"] == "exit" else config["bits"] < 5


class RaisingProbe(Chip):
    @classmethod
    def probe(cls):
        raise OSError("driver 1.2 is too old")


class Raising(Chip):
    @classmethod
    def default_dtype(cls, checkpoint_dtype):
        raise RuntimeError("device is lost")


class ExitingProbe(Chip):
    @classmethod
    def probe(cls):
        raise SystemExit("no licence")


class SilentProbe(Chip):
    @classmethod
    def probe(cls):
        return None


class Refusing(Chip):
    @classmethod
    def default_dtype(cls, checkpoint_dtype):
        raise ConfigError("the driver is too old; update it.")


def facts(hf_config):
    if "broken" in hf_config:
        raise ConfigError("rope type 'x' is not supported; use another checkpoint.")
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_size=hf_config.get("head_size", 64),
        scale=0.125,
        window=hf_config.get("window"),
        soft_cap=hf_config.get("soft_cap"),
    )
    return ModelFacts(
        attention=[spec] * 2,
        vocab_size=hf_config.get("vocab", 100),
        max_positions=hf_config["positions"],
        dtype=torch.bfloat16,
        needs=frozenset(hf_config.get("needs", ())),
    )


Toy = concrete(Model, facts=classmethod(lambda cls, hf_config: facts(hf_config)))
ToyWithoutFacts = concrete(Model, facts=classmethod(lambda cls, hf_config: None))
ExitingToy = concrete(Model, facts=classmethod(lambda cls, hf_config: sys.exit(3)))

PLATFORM = PlatformManifest(
    name="chip",
    summary="",
    device_type="meta",
    dtypes=("bfloat16", "float32"),
    attention=("fast", "plain"),
)
PLAIN = AttentionManifest(
    name="plain",
    summary="",
    device_types=("meta",),
    dtypes=("bfloat16", "float32"),
    kv_dtypes=("auto", "fp8"),
    sliding_window=True,
    soft_cap=True,
    verify=True,
)
FAST = AttentionManifest(
    name="fast", summary="", device_types=("meta",), dtypes=("bfloat16",), head_sizes=(64, 128), block_sizes=(16, 32)
)
TOY = ModelManifest(name="toy", summary="", architectures=("ToyForCausalLM",))
NONE = QuantManifest(name="none", summary="")
FOUR = QuantManifest(name="four", summary="", checkpoint_methods=("int4",), dtypes=("bfloat16",))
GUESS = SpecDecoderManifest(name="guess", summary="", defaults={"width": 2})


def put(registry, manifest, attribute, **owner):
    owner = {"plugin": "fake", "distribution": "dist-fake", "version": "1.0"} | owner
    registry.add(Entry(manifest=manifest, target=f"{__name__}:{attribute}", **owner))


@pytest.fixture
def registries():
    registries = Registries()
    put(registries.platforms, PLATFORM, "Chip")
    put(registries.attention, PLAIN, "Attention")
    put(registries.attention, FAST, "Attention")
    put(registries.models, TOY, "Toy")
    put(registries.quant, NONE, "Quant")
    put(registries.quant, FOUR, "Quant")
    put(registries.spec_decoders, GUESS, "Speculator")
    return registries


@pytest.fixture
def make(tmp_path):
    """Write a checkpoint's config.json and return options that name it."""

    def options(config=None, **given):
        content = {"architectures": ["ToyForCausalLM"], "positions": 256, "eos_token_id": 2} | (config or {})
        (tmp_path / "config.json").write_text(json.dumps(content))
        return EngineOptions(**{"model": str(tmp_path)} | given)

    return options


def change(registry, name, **fields):
    """Replace a manifest's fields, or its target."""
    entry = registry.entries[name]
    target = fields.pop("target", None)
    manifest = dataclasses.replace(entry.manifest, **fields)
    target = f"{__name__}:{target}" if target else entry.target
    registry.entries[name] = msgspec.structs.replace(entry, manifest=manifest, target=target)


def reasons(options, registries):
    with pytest.raises(ResolutionError) as caught:
        resolve(options, registries)
    assert str(caught.value).startswith(f"Cannot run {options.model} as asked:\n  - ")
    return list(caught.value.reasons)


def reason(options, registries):
    (only,) = reasons(options, registries)
    return only


# what resolves


def test_defaults(make, registries, tmp_path):
    config = resolve(make(), registries)
    assert isinstance(config, EngineConfig)
    assert [getattr(config, part).name for part in ("platform", "model", "attention", "quant")] == [
        "chip",
        "toy",
        "fast",
        "none",
    ]
    assert config.spec_decoder is None
    assert (config.dtype, config.kv_dtype) == ("bfloat16", "bfloat16")
    assert (config.vocab_size, config.max_model_len, config.eos_token_ids) == (100, 256, (2,))
    assert (config.model_path, config.model_name) == (str(tmp_path), str(tmp_path))
    assert config.kv_cache_memory is None
    assert config.attention.why == "the platform's first that supports the model"
    assert config.platform.distribution == "dist-fake"


def test_options_arrive(make, registries):
    given = {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 77,
        "block_size": 32,
        "kv_cache_memory": 0.5,
        "enable_prefix_caching": False,
        "scheduling_policy": "priority",
        "seed": 5,
        "num_threads": 1,
        "max_model_len": 100,
    }
    config = resolve(make(**given), registries)
    assert config.kv_cache_memory == 2**29
    for name in set(given) - {"kv_cache_memory"}:
        assert getattr(config, name) == given[name], name


def test_configuration_crosses_processes(make, registries):
    config = resolve(make(speculative_config={"method": "guess", "num_speculative_tokens": 2}), registries)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def test_resolver_is_pure(make, registries):
    before = registries.encode()
    assert resolve(make(), registries) == resolve(make(), registries)
    assert registries.encode() == before


# platform


def test_auto_takes_the_available_platform_of_highest_priority(make, registries):
    put(registries.platforms, dataclasses.replace(PLATFORM, name="best", priority=9), "Missing")
    put(registries.platforms, dataclasses.replace(PLATFORM, name="better", priority=5), "Float")
    explanation = explain(make(), registries)
    part = explanation.parts[0]
    assert (part.part, part.chosen.name, part.plugin) == ("platform", "better", "fake")
    assert [(r.name, r.reasons) for r in part.rejected] == [
        ("best", ("not available here: no such device; plug one in",)),
        ("chip", ("'better' comes first",)),
    ]
    assert explanation.config.dtype == "float32", "the platform's own default"


def test_named_platform_must_be_available(make, registries):
    put(registries.platforms, dataclasses.replace(PLATFORM, name="best"), "Missing")
    text = reason(make(platform="best"), registries)
    assert "platform 'best' of plugin 'fake' (dist-fake 1.0): not available here: no such device; plug one in" in text
    assert text.endswith("plug one in. Repair that, or leave out --platform to use what is available.")


def test_no_platform_is_available(make, registries):
    change(registries.platforms, "chip", target="Missing")
    assert "no such device" in reason(make(), registries)


def test_no_platform_is_registered(make, registries):
    registries.platforms.entries.clear()
    assert "No platform is registered; reinstall dovetail-core" in reason(make(), registries)


def test_unknown_names_are_all_reported_with_the_nearest(make, registries):
    given = {"platform": "chop", "attention": "fats", "quantization": "fourr"}
    found = reasons(make(speculative_config={"method": "gues", "num_speculative_tokens": 1}, **given), registries)
    for near in ("chip", "fast", "four", "guess"):
        assert sum(f"Did you mean '{near}'?" in text for text in found) == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("RaisingProbe", "OSError: driver 1.2 is too old"),
        ("ExitingProbe", "SystemExit: no licence"),
        ("SilentProbe", "AttributeError: 'NoneType'"),
    ],
)
def test_probe_that_raises_is_a_reason(make, registries, target, expected):
    change(registries.platforms, "chip", target=target)
    assert f"its probe raised {expected}" in reason(make(), registries)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("NoSuchClass", "cannot be imported from"),
        ("NotAModel", "is not a subclass of dovetail.contracts.platform.Platform"),
        ("Incomplete", "leaves methods of its contract undefined: __init__, compile, default_dtype"),
    ],
)
def test_class_that_breaks_its_contract(make, registries, target, expected):
    change(registries.platforms, "chip", target=target)
    assert expected in reason(make(platform="chip"), registries)


def test_broken_candidate_of_auto_is_passed_over_with_a_warning(make, registries, caplog):
    put(registries.platforms, dataclasses.replace(PLATFORM, name="best", priority=9), "NoSuchClass")
    with caplog.at_level(logging.WARNING, logger="dovetail.resolver"):
        config = resolve(make(), registries)
    assert config.platform.name == "chip"
    assert "'best' of plugin 'fake' (dist-fake 1.0) cannot be imported" in caplog.text


# dtype


def test_dtype_that_the_platform_lacks(make, registries):
    found = reasons(make(dtype="float16"), registries)
    assert "platform 'chip' does not compute in --dtype float16; choose auto or bfloat16 or float32." in found


def test_explicit_dtype(make, registries):
    config = resolve(make(dtype="float32"), registries)
    assert (config.dtype, config.kv_dtype) == ("float32", "float32")
    assert config.attention.name == "plain", "the first backend does not accept it"


def test_auto_dtype_outside_the_manifest_is_refused(make, registries):
    change(registries.platforms, "chip", target="Odd")
    assert "answers --dtype auto with float64, which its own manifest does not list" in reason(make(), registries)


def test_platform_that_names_no_default_dtype(make, registries):
    change(registries.platforms, "chip", target="Raising")
    expected = "platform 'chip' names no default dtype: RuntimeError: device is lost; set --dtype."
    assert expected in reason(make(), registries)
    change(registries.platforms, "chip", target="Refusing")
    assert reason(make(), registries) == "the driver is too old; update it."


# model


def test_unknown_architecture(make, registries):
    text = reason(make({"architectures": ["ToyForCausalML"]}), registries)
    assert "No installed plugin serves the architecture ToyForCausalML. Did you mean 'ToyForCausalLM'?" in text
    assert "Served: ToyForCausalLM. Install the distribution that brings it" in text


def test_unknown_architecture_mentions_broken_plugins(make, registries):
    broken = PluginStatus(name="zoo", distribution="dist-zoo", version="3", state="quarantined", error="ImportError: x")
    registries.freeze((broken,))
    assert "plugin 'zoo' (dist-zoo 3) might provide it" in reason(make({"architectures": ["Zebra"]}), registries)


def test_config_without_architectures(make, registries):
    assert "names no architectures" in reason(make({"architectures": None}), registries)


@pytest.mark.parametrize("names", ["ToyForCausalLM", 5, [1], {"a": 1}])
def test_architectures_of_a_wrong_type(make, registries, names):
    text = reason(make({"architectures": names}), registries)
    assert text == f"architectures in config.json is {names!r}; it must be a list of names."


@pytest.mark.parametrize("target", ["ToyWithoutFacts", "ExitingToy"])
def test_family_that_answers_no_facts(make, registries, target):
    change(registries.models, "toy", target=target)
    expected = {"ToyWithoutFacts": "TypeError: its facts are None, not ModelFacts", "ExitingToy": "SystemExit: 3"}
    assert f"cannot read config.json: {expected[target]}" in reason(make(), registries)


def test_family_that_refuses_the_checkpoint(make, registries):
    text = reason(make({"broken": True}), registries)
    who = "model family 'toy' of plugin 'fake' (dist-fake 1.0)"
    assert text == f"{who}: rope type 'x' is not supported; use another checkpoint."


def test_family_that_cannot_read_the_checkpoint(make, registries):
    assert "cannot read config.json: TypeError" in reason(make({"needs": 1}), registries)


def test_platforms_own_family_wins_there_by_priority(make, registries):
    own = dataclasses.replace(TOY, name="toy-chip", platform="chip")
    put(registries.models, own, "Toy")
    assert resolve(make(), registries).model.name == "toy-chip", "equal priority: the specific one"
    change(registries.models, "toy", priority=1)
    assert resolve(make(), registries).model.name == "toy"
    change(registries.models, "toy-chip", priority=2)
    assert resolve(make(), registries).model.name == "toy-chip"


def test_another_platforms_family_is_passed_over(make, registries):
    put(registries.models, dataclasses.replace(TOY, name="toy-other", platform="other", priority=9), "Toy")
    model = explain(make(), registries).parts[1]
    assert model.chosen.name == "toy"
    assert model.rejected[0].reasons == ("made for platform 'other' alone",)


# attention


def test_auto_takes_the_platforms_order(make, registries):
    change(registries.platforms, "chip", attention=("plain", "fast"))
    change(registries.attention, "fast", priority=100)
    part = explain(make(), registries).parts[2]
    assert part.chosen.name == "plain"
    assert part.rejected[0].reasons == ("'plain' comes first",)


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({"window": 8}, {}, "lacks sliding_window, which the model needs"),
        ({"soft_cap": 50.0}, {}, "lacks soft_cap, which the model needs"),
        ({"head_size": 80}, {}, "has no head size 80, which the model needs (it has 64, 128)"),
        ({}, {"dtype": "float32"}, "does not accept float32; choose --dtype bfloat16"),
        ({}, {"block_size": 48}, "has no 48-token blocks; choose --block-size 16 or 32"),
        ({}, {"kv_cache_dtype": "fp8"}, "cannot store the KV cache as fp8; choose --kv-cache-dtype auto"),
        (
            {},
            {"speculative_config": {"method": "guess", "num_speculative_tokens": 1}},
            "lacks verify, which speculative method 'guess' needs; leave out --speculative-config",
        ),
    ],
)
def test_backend_that_lacks_something(make, registries, config, given, expected):
    """auto takes the next that can and says why; the named one is refused, with what to change."""
    part = explain(make(config, **given), registries).parts[2]
    assert part.chosen.name == "plain"
    (passed_over,) = [r for r in part.rejected if r.name == "fast"]
    assert any(expected in text for text in passed_over.reasons)
    text = reason(make(config, attention="fast", **given), registries)
    assert text.startswith("attention backend 'fast' of plugin 'fake' (dist-fake 1.0): ")
    assert expected in text
    assert text.endswith("choose another --attention.")


def test_all_gaps_of_all_backends_are_collected(make, registries):
    found = reasons(make({"needs": ["mla"], "window": 4}, block_size=48, kv_cache_dtype="int3"), registries)
    plain = [text for text in found if "'plain'" in text]
    fast = [text for text in found if "'fast'" in text]
    assert len(plain) == 2, plain
    assert len(fast) == 4, fast


def test_backend_of_another_device(make, registries):
    put(registries.attention, dataclasses.replace(PLAIN, name="alien", device_types=("mars",)), "Attention")
    assert "runs on mars, not on meta of platform 'chip'" in reason(make(attention="alien"), registries)


def test_backend_that_the_platform_does_not_list_must_be_asked_for(make, registries):
    put(registries.attention, dataclasses.replace(PLAIN, name="third"), "Attention")
    part = explain(make(), registries).parts[2]
    assert part.rejected[-1].name == "third"
    assert "ask for it with --attention" in part.rejected[-1].reasons[0]
    assert resolve(make(attention="third"), registries).attention.why == "asked for with --attention"


def test_platform_lists_only_backends_that_are_not_installed(make, registries):
    change(registries.platforms, "chip", attention=("gone",))
    text = reason(make(), registries)
    assert "lists attention backends gone, but none of them is registered" in text
    assert "Registered: fast, plain." in text


def test_kv_dtype(make, registries):
    assert resolve(make(kv_cache_dtype="fp8"), registries).kv_dtype == "fp8"
    assert resolve(make(kv_cache_dtype="bfloat16"), registries).kv_dtype == "bfloat16", "the activation dtype itself"


# quantization

INT4 = {"quantization_config": {"quant_method": "int4", "bits": 4}}


def test_quantized_checkpoint_is_recognised(make, registries):
    quant = resolve(make(INT4), registries).quant
    assert (quant.name, quant.why) == ("four", "recognises the checkpoint's quantization_config")
    assert resolve(make(INT4, quantization="four"), registries).quant.why == "asked for with --quantization"


def test_unreadable_quantization(make, registries):
    text = reason(make({"quantization_config": {"quant_method": "int7"}}), registries)
    assert "quantized with 'int7', which no installed plugin can read. Install" in text


def test_method_that_does_not_recognise_the_section(make, registries):
    text = reason(make({"quantization_config": {"quant_method": "int4", "bits": 3}}), registries)
    who = "quantization method 'four' of plugin 'fake' (dist-fake 1.0)"
    assert f"{who}: does not recognise the checkpoint's quantization_config" in text


@pytest.mark.parametrize(("bits", "expected"), [([], "TypeError: "), ("exit", "SystemExit: 4"), (None, "unheard of.")])
def test_method_that_cannot_read_the_section(make, registries, bits, expected):
    change(registries.quant, "four", target="FragileQuant")
    text = reason(make({"quantization_config": {"quant_method": "int4", "bits": bits}}), registries)
    assert text.startswith("quantization method 'four' of plugin 'fake' (dist-fake 1.0): ")
    assert expected in text


@pytest.mark.parametrize("section", ["int4", ["int4"], 4])
def test_section_of_a_wrong_type(make, registries, section):
    text = reason(make({"quantization_config": section}), registries)
    assert text == f"config.json has quantization_config {section!r}; it must be an object with a quant_method."


def test_two_methods_for_one_checkpoint(make, registries):
    put(registries.quant, dataclasses.replace(FOUR, name="four-fast", priority=1), "Quant")
    part = explain(make(INT4), registries).parts[3]
    assert (part.chosen.name, part.rejected[0].reasons) == ("four-fast", ("'four-fast' comes first",))


def test_named_method_against_the_checkpoint(make, registries):
    assert "quantized with 'int4'; leave out --quantization" in reason(make(INT4, quantization="none"), registries)
    assert "cannot quantize while loading" in reason(make(quantization="four"), registries)


def test_quantize_on_load(make, registries):
    change(registries.quant, "four", on_load=True)
    assert resolve(make(quantization="four"), registries).quant.name == "four"


def test_method_that_does_not_work_in_the_dtype(make, registries):
    text = reason(make(INT4, dtype="float32"), registries)
    assert "does not work with activations in float32; choose --dtype bfloat16." in text


def test_method_that_needs_an_unknown_operation(make, registries):
    change(registries.quant, "four", ops=frozenset({"linear", "warp"}))
    assert "needs operations that this core lacks: warp;" in reason(make(INT4), registries)


# speculation


def test_speculation(make, registries):
    section = {"method": "guess", "num_speculative_tokens": 3, "width": 7}
    config = resolve(make(speculative_config=section), registries)
    assert (config.spec_decoder.name, config.num_speculative_tokens) == ("guess", 3)
    assert config.spec_options == {"width": 7}
    assert config.attention.name == "plain"
    del section["width"]
    assert resolve(make(speculative_config=section), registries).spec_options == {"width": 2}, "the default"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, "names no method; give one that is registered: guess."),
        ({"method": 3}, "has method 3; give one that is registered: guess."),
        ({"method": "guess"}, "num_speculative_tokens None; give a whole number of at least 1"),
        ({"method": "guess", "num_speculative_tokens": 0}, "num_speculative_tokens 0;"),
        ({"method": "guess", "num_speculative_tokens": True}, "num_speculative_tokens True;"),
        ({"method": "guess", "num_speculative_tokens": 2049}, "at most --max-num-batched-tokens 2048 tokens;"),
        ({"method": "guess", "num_speculative_tokens": 1, "widht": 1}, "no option 'widht'. Did you mean 'width'?"),
        ({"method": "guess", "num_speculative_tokens": 1, "model": "m"}, "no option 'model'"),
    ],
)
def test_wrong_speculative_config(make, registries, section, expected):
    assert expected in reason(make(speculative_config=section), registries)


@pytest.fixture
def draft(registries, tmp_path):
    """Write a draft checkpoint and return the section that names it."""
    change(registries.spec_decoders, "guess", needs_draft_model=True)

    def section(config=None, folder="draft", **files):
        path = tmp_path / folder
        path.mkdir()
        content = {"architectures": ["ToyForCausalLM"], "positions": 512, "eos_token_id": 2} | (config or {})
        for name, value in {"config": content, **files}.items():
            (path / f"{name}.json").write_text(json.dumps(value))
        return {"method": "guess", "num_speculative_tokens": 3, "model": str(path)}

    return section


def test_draft_model(make, registries, draft):
    explanation = explain(make({"name": "target"}, speculative_config=draft({"name": "draft"})), registries)
    config = explanation.config
    own = config.draft
    assert config.spec_options == {"width": 2}
    assert (own.hf_config["name"], own.spec_decoder, own.draft, own.spec_options) == ("draft", None, None, {})
    assert own.model_path.endswith("draft")
    for field in ("platform", "attention", "dtype", "max_model_len", "block_size", "num_speculative_tokens"):
        assert getattr(own, field) == getattr(config, field)
    parts = {part.part: part.chosen.name for part in explanation.parts}
    assert (parts["draft model"], parts["draft quantization"]) == ("toy", "none")


def test_draft_model_keeps_its_own_number_format(make, registries, draft):
    section = draft(INT4)
    assert resolve(make(speculative_config=section), registries).draft.quant.name == "four"
    change(registries.quant, "four", on_load=True)
    plain = draft(folder="plain")
    config = resolve(make(speculative_config=plain, quantization="four"), registries)
    assert (config.quant.name, config.draft.quant.name) == ("four", "none")


def test_draft_model_must_be_named_and_found(make, registries, draft):
    assert "needs a draft model" in reason(make(speculative_config=draft() | {"model": ""}), registries)
    assert "needs a draft model" in reason(make(speculative_config=draft(folder="b") | {"model": 5}), registries)
    lost = reason(make(speculative_config=draft(folder="c") | {"model": "./lost"}), registries)
    assert lost.startswith("draft model: There is no folder ./lost")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab": 99}, "its vocabulary has 99 tokens, and the model's has 100; choose another"),
        ({"positions": 128}, "made for 128 positions, and --max-model-len is 256; choose --max-model-len 128, or"),
        ({"head_size": 48}, "attention backend 'plain', which it shares with the model, has no head size 48"),
        ({"architectures": ["Unheard"]}, "No installed plugin serves the architecture Unheard."),
        ({"quantization_config": {"quant_method": "odd"}}, "is quantized with 'odd', which no installed plugin"),
    ],
)
def test_draft_models_that_do_not_fit(make, registries, draft, config, expected):
    change(registries.attention, "plain", head_sizes=(64,))
    section = draft(config)
    text = reason(make(speculative_config=section), registries)
    assert text.startswith(f"draft model {section['model']}: ")
    assert expected in text


def test_draft_model_needs_the_same_tokenizer(make, registries, draft, tmp_path):
    ours = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<end>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(ours))
    same = {"added_tokens": ours["added_tokens"], "model": {"vocab": {"b": 1, "a": 0}}, "note": 1}
    assert resolve(make(speculative_config=draft(tokenizer=same)), registries).draft is not None
    other = {"model": {"vocab": {"a": 0, "b": 3}}, "added_tokens": ours["added_tokens"]}
    text = reason(make(speculative_config=draft(folder="other", tokenizer=other)), registries)
    assert "gives token 'b' the id 3, and the model's 1, so drafts would mean other text" in text


@pytest.mark.parametrize("content", [{"model": None}, {"model": {"vocab": 5}}, {"added_tokens": [{"content": "a"}]}])
def test_draft_model_with_a_tokenizer_that_makes_no_sense(make, registries, draft, tmp_path, content):
    (tmp_path / "tokenizer.json").write_text("{}")
    text = reason(make(speculative_config=draft(tokenizer=content)), registries)
    assert "its tokenizer cannot be compared with the model's: " in text
    assert text.endswith('choose another "model" in --speculative-config.')


def test_broken_speculator(make, registries):
    change(registries.spec_decoders, "guess", target="NoSuchClass")
    section = {"method": "guess", "num_speculative_tokens": 1}
    assert "cannot be imported" in reason(make(speculative_config=section), registries)


# lengths


def test_context_longer_than_the_checkpoints(make, registries):
    text = reason(make(max_model_len=257), registries)
    assert text == (
        "--max-model-len 257 exceeds the 256 positions that the checkpoint was made for; choose at most 256."
    )
    assert resolve(make(max_model_len=256), registries).max_model_len == 256


def test_without_chunked_prefill_a_prompt_must_fit_one_step(make, registries):
    given = {"enable_chunked_prefill": False, "max_num_batched_tokens": 100}
    assert "Without chunked prefill a prompt of up to 256 tokens" in reason(make(**given), registries)
    assert not resolve(make(max_model_len=100, **given), registries).enable_chunked_prefill


# plugins that were asked for


def test_broken_plugin_that_was_asked_for_stops_everything(make, registries):
    broken = PluginStatus(
        name="zoo", distribution="dist-zoo", version="3", state="failed", asked=True, error="ImportError: libzoo"
    )
    registries.freeze((broken,))
    with pytest.raises(PluginLoadError, match=r"names plugin 'zoo' \(dist-zoo 3\), which failed: ImportError: libzoo"):
        resolve(make(), registries)
    explanation = explain(make(), registries)
    assert explanation.config is None
    assert "libzoo" in explanation.reasons[0]


def test_broken_plugin_that_nobody_asked_for_does_not(make, registries):
    details = {"distribution": "dist-zoo", "version": "3", "error": "ImportError: libzoo"}
    broken = PluginStatus(name="zoo", state="quarantined", **details)
    registries.freeze((broken,))
    assert resolve(make(), registries).model.name == "toy"


def test_reasons_of_different_parts_come_together(make, registries):
    found = reasons(
        make({"quantization_config": {"quant_method": "int7"}}, max_model_len=999, attention="nope"), registries
    )
    assert len(found) == 3


def test_explanation_is_json(make, registries):
    json.dumps(msgspec.to_builtins(explain(make(), registries)))


# what parts declare about each other


def test_platform_with_a_shorter_context(make, registries):
    change(registries.platforms, "chip", max_context=128)
    text = reason(make(), registries)
    assert text == (
        "platform 'chip' runs contexts of at most 128 tokens, and 256 are asked for; choose --max-model-len 128, or "
        "another --platform."
    )
    assert resolve(make(max_model_len=128), registries).max_model_len == 128


def test_backend_with_a_shorter_context(make, registries):
    change(registries.attention, "fast", max_context=128)
    assert resolve(make(), registries).attention.name == "plain"
    text = reason(make(attention="fast"), registries)
    assert "attends to at most 128 tokens, and a context of 256 is asked for; choose --max-model-len 128, or" in text


def test_platform_that_cannot_hold_the_kv_dtype(make, registries):
    change(registries.platforms, "chip", kv_dtypes=("auto",))
    text = reason(make(kv_cache_dtype="fp8"), registries)
    assert text.startswith("platform 'chip' cannot hold the KV cache as fp8; choose --kv-cache-dtype auto, or another")
    assert resolve(make(kv_cache_dtype="bfloat16"), registries).kv_dtype == "bfloat16", "what auto means here"


def test_family_that_does_not_compute_right_in_a_dtype(make, registries):
    change(registries.models, "toy", dtypes=("float32",))
    found = reasons(make(dtype="bfloat16"), registries)
    assert found == [
        "model family 'toy' does not compute right in --dtype bfloat16; choose auto or float32.",
    ]
    assert resolve(make(), registries).dtype == "float32", "the platform's first that is right"
    change(registries.models, "toy", dtypes=("float16",))
    (text,) = reasons(make(), registries)
    assert "computes right in float16 alone, and platform 'chip' in bfloat16 or float32" in text


def test_method_and_speculator_of_another_device(make, registries):
    change(registries.quant, "four", device_types=("mars",), on_load=True)
    text = reason(make(quantization="four"), registries)
    assert "runs on mars, not on meta of platform 'chip'; choose another --quantization or --platform." in text
    change(registries.spec_decoders, "guess", device_types=("mars",))
    section = {"method": "guess", "num_speculative_tokens": 1}
    text = reason(make(speculative_config=section), registries)
    assert "runs on mars, not on meta of platform 'chip'; leave out --speculative-config." in text


def test_experts_need_a_method_for_them(make, registries):
    sparse = {"needs": ["experts"]}
    text = reason(make(sparse), registries)
    assert "quantization method 'none' of plugin 'fake' (dist-fake 1.0): lacks experts, which the model needs" in text
    change(registries.quant, "none", experts=True)
    assert resolve(make(sparse), registries).quant.name == "none"
    change(registries.quant, "four", on_load=True)
    explanation = explain(make(sparse, quantization="four"), registries)
    assert "lacks experts" in explanation.reasons[0]
    assert [c.option for c in explanation.nearest.changes] == ["--quantization"]


def test_need_that_nothing_declares(make, registries):
    text = reason(make({"needs": ["warp"]}), registries)
    assert text == (
        "model family 'toy' of dist-fake needs warp, which this core does not know; install matching releases."
    )


def test_speculator_says_what_it_needs_of_attention(make, registries):
    change(registries.spec_decoders, "guess", needs=frozenset({"verify", "tree"}))
    section = {"method": "guess", "num_speculative_tokens": 1}
    text = reason(make(attention="plain", speculative_config=section), registries)
    assert "lacks tree, which speculative method 'guess' needs; leave out --speculative-config" in text


def test_every_gap_of_a_method_is_told(make, registries):
    change(registries.quant, "four", ops=frozenset({"warp"}), device_types=("mars",))
    found = reasons(make(quantization="four", dtype="float32"), registries)
    assert all(any(part in text for text in found) for part in ("cannot quantize", "float32", "mars", "warp"))


# what works instead


def nearest(options, registries):
    with pytest.raises(ResolutionError) as caught:
        resolve(options, registries)
    return caught.value.nearest


def test_nearest_is_the_exact_command_line(make, registries):
    options = make(attention="fast", block_size=48, seed=3)
    assert nearest(options, registries) == (
        f"Nearest that works: {options.model} --block-size 32 --seed 3 --attention fast "
        "(changed: --block-size 48 → 32). --allow-fallback takes it without asking."
    )


def test_what_was_asked_for_is_kept_if_something_else_can_change(make, registries):
    change(registries.platforms, "chip", target="Float")
    options = make(attention="fast")
    assert "(changed: --dtype auto → bfloat16)" in nearest(options, registries)


def test_misspelt_names_become_those_that_were_meant(make, registries):
    assert "(changed: --attention plian → plain)" in nearest(make(attention="plian"), registries)


def test_option_that_is_left_out(make, registries):
    options = make(quantization="four", dtype="float32")
    assert "(changed: --quantization four → (not given))" in nearest(options, registries)


def test_nothing_helps_a_model_that_nobody_knows(make, registries):
    text = nearest(make({"architectures": ["Zebra"]}), registries)
    assert text.startswith("Nearest that works: none found (")


def test_platform_is_probed_once_however_long_the_search(make, registries, monkeypatch):
    probes = []
    monkeypatch.setattr(Chip, "probe", classmethod(lambda cls: probes.append(1) or Probe(available=True)))
    explanation = explain(make(attention="nope", block_size=48, dtype="float16", max_model_len=999), registries)
    assert explanation.tried > 20
    assert len(probes) == 2, "once for auto, and once by name"


def test_search_among_thousands_of_names_ends(make, registries):
    for count in range(3000):
        put(registries.attention, dataclasses.replace(PLAIN, name=f"plain-{count}"), "Attention")
    begin = time.perf_counter()
    explanation = explain(make(attention="nope", max_model_len=999, quantization="none", dtype="float16"), registries)
    assert explanation.nearest is not None
    assert time.perf_counter() - begin < 10


# --allow-fallback


def test_fallback_is_taken_only_when_allowed(make, registries, caplog):
    given = {"attention": "fast", "block_size": 48}
    with pytest.raises(ResolutionError):
        resolve(make(**given), registries)
    with caplog.at_level(logging.WARNING, logger="dovetail.resolver"):
        config = resolve(make(**given, allow_fallback=True), registries)
    assert config.block_size == 32
    (taken,) = config.fallbacks
    assert (taken.option, taken.asked, taken.got) == ("--block-size", "48", "32")
    assert taken.why == (
        "attention backend 'fast' of plugin 'fake' (dist-fake 1.0): has no 48-token blocks; choose --block-size 16 or "
        "32, or choose another --attention.",
    )
    assert f"Fallback: --block-size 48 → 32, since {taken.why[0]}" in caplog.text
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def test_fallback_is_explained(make, registries):
    explanation = explain(make(attention="fast", block_size=48, allow_fallback=True), registries)
    assert len(explanation.reasons) == 1
    assert explanation.config.fallbacks == explanation.nearest.changes
    assert explanation.parts[2].chosen.name == "fast"


def test_what_runs_as_asked_has_no_fallback(make, registries):
    assert resolve(make(allow_fallback=True), registries) == resolve(make(), registries)


def test_no_fallback_without_a_broken_plugin_that_was_asked_for(make, registries):
    failed = PluginStatus(name="zoo", distribution="d", version="3", state="failed", asked=True, error="ImportError: x")
    registries.freeze((failed,))
    with pytest.raises(PluginLoadError):
        resolve(make(attention="fast", block_size=48, allow_fallback=True), registries)
    assert explain(make(allow_fallback=True), registries).config is None


def test_rejected_candidates_are_part_of_the_configuration(make, registries):
    config = resolve(make(dtype="float32"), registries)
    (rejected,) = config.rejected["attention"]
    assert rejected.name == "fast"
    assert "does not accept float32" in rejected.reasons[0]


def test_of_many_choices_a_message_offers_a_few(make, registries):
    change(registries.attention, "fast", block_sizes=tuple(range(16, 513, 16)))
    text = reason(make(attention="fast", block_size=20), registries)
    assert "choose --block-size 16 or 32 or 48 or 64 or … or 512, or choose another" in text


def test_compiled_code_is_kept_where_the_user_says_or_keeps_caches(make, registries, monkeypatch):
    def kept(**options):
        return resolve(make(**options), registries).compile_cache

    for name in ("DOVETAIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/anna")
    assert kept() == "/home/anna/.cache/dovetail"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert kept() == "/fast/dovetail"
    monkeypatch.setenv("DOVETAIL_CACHE", "/kernels")
    assert kept() == "/kernels"
    assert kept(compile_cache="/mine") == "/mine"


def test_without_a_home_nothing_is_kept(make, registries, monkeypatch):
    def no_home(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    for name in ("DOVETAIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    assert resolve(make(), registries).compile_cache is None
