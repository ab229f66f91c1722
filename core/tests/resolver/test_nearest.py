"""Every declared capability counts, and the nearest configuration is the nearest: against an oracle of its own.

Manifests, models and requests are drawn at random. The oracle is a predicate over one request; the resolver must accept
exactly what it accepts, and where it refuses, must name a request with as few changes as trying all of them finds.
"""

import dataclasses
import itertools
import json
import random
from types import SimpleNamespace
from typing import Any

import click
import msgspec
import pytest
import torch

from dovetail.cli.options import with_options
from dovetail.contracts.attention import AttentionBackend, AttentionSpec
from dovetail.contracts.model import Model, ModelFacts
from dovetail.contracts.platform import Platform, Probe
from dovetail.contracts.quant import QuantMethod
from dovetail.contracts.specdec import SpecDecoder
from dovetail.errors import ResolutionError
from dovetail.options import EngineOptions, flag
from dovetail.plugins.manifest import (
    AttentionManifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)
from dovetail.plugins.registry import Entry, Registries
from dovetail.resolution import alternatives
from dovetail.resolution import nearest as search
from dovetail.resolution.case import Case
from dovetail.resolution.nearest import MAX_CHANGES
from dovetail.resolver import Explanation, explain, resolve

DTYPES = ("bfloat16", "float16", "float32")
SEEDS = range(120)


def concrete(base, **members):
    abstract = {name: lambda *args, **kwargs: None for name in base.__abstractmethods__}
    return type(f"Fake{base.__name__}", (base,), abstract | members)


def chip(available, dtype):
    return concrete(
        Platform,
        probe=classmethod(lambda cls: Probe(available=available, reason="" if available else "no device; plug one in")),
        default_dtype=classmethod(lambda cls, checkpoint: dtype),
    )


Here32, Here16 = chip(True, torch.float32), chip(True, torch.bfloat16)
Gone32, Gone16 = chip(False, torch.float32), chip(False, torch.bfloat16)
Attention, Speculator = concrete(AttentionBackend), concrete(SpecDecoder)
Quant = concrete(QuantMethod, recognises=classmethod(lambda cls, section: True))


def read_facts(hf_config):
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_size=hf_config["head_size"],
        scale=0.1,
        window=hf_config["window"],
        soft_cap=hf_config["soft_cap"],
    )
    return ModelFacts(
        attention=[spec],
        vocab_size=100,
        max_positions=hf_config["positions"],
        dtype=torch.bfloat16,
        needs=frozenset(hf_config["needs"]),
    )


Toy = concrete(Model, facts=classmethod(lambda cls, hf_config: read_facts(hf_config)))


@dataclasses.dataclass
class World:
    """One drawn machine, set of plugins, and model."""

    chips: dict[str, tuple[PlatformManifest, bool, str]]
    backends: dict[str, AttentionManifest]
    methods: dict[str, QuantManifest]
    speculators: dict[str, SpecDecoderManifest]
    family: ModelManifest
    model: dict[str, Any]
    registries: Registries


def draw(seed):
    rng = random.Random(seed)

    def some(values, least=1):
        chosen = [value for value in values if rng.random() < 0.8]
        return tuple(chosen) if len(chosen) >= least else (rng.choice(values),)

    def maybe(value, chance=0.5):
        return value if rng.random() < chance else None

    chips = {}
    for name, device in (("one", "a"), ("two", "b")):
        default = rng.choice(("float32", "bfloat16"))
        manifest = PlatformManifest(
            name=name,
            summary="",
            priority=rng.randrange(3),
            device_type=device,
            dtypes=tuple(dict.fromkeys((default, *some(DTYPES)))),
            attention=some(("fast", "plain", "odd")),
            kv_dtypes=rng.choice(((), ("auto",), ("auto", "fp8"))),
            max_context=maybe(rng.choice((100, 200)), 0.3),
        )
        chips[name] = (manifest, rng.random() < 0.8, default)
    backends = {
        name: AttentionManifest(
            name=name,
            summary="",
            device_types=some(("a", "b")),
            dtypes=some(DTYPES),
            kv_dtypes=rng.choice((("auto",), ("auto", "fp8"), ("auto", "fp8"), ("fp8",))),
            head_sizes=rng.choice(((), (), (64,), (64, 80))),
            block_sizes=rng.choice(((), (), (16,), (32, 48))),
            sliding_window=rng.random() < 0.9,
            soft_cap=rng.random() < 0.9,
            mla=rng.random() < 0.8,
            tree=rng.random() < 0.8,
            verify=rng.random() < 0.8,
            max_context=maybe(rng.choice((64, 150)), 0.4),
        )
        for name in ("fast", "plain", "odd")
    }
    methods = {
        "none": QuantManifest(name="none", summary="", experts=True),
        "tiny": QuantManifest(
            name="tiny",
            summary="",
            on_load=rng.random() < 0.8,
            dtypes=rng.choice(((), ("float32",), ("bfloat16",))),
            device_types=rng.choice(((), ("a",), ("b",))),
            experts=rng.random() < 0.5,
        ),
    }
    speculators = {
        "guess": SpecDecoderManifest(
            name="guess",
            summary="",
            defaults={"num_speculative_tokens": 2},
            needs=frozenset(some(("verify", "tree"))),
            device_types=rng.choice(((), ("a",), ("b",))),
        )
    }
    right = rng.choice(((), ("float32",), DTYPES))
    family = ModelManifest(name="toy", summary="", architectures=("Toy",), dtypes=right)
    model = {
        "architectures": ["Toy"],
        "head_size": rng.choice((64, 80)),
        "window": maybe(8, 0.3),
        "soft_cap": maybe(5.0, 0.3),
        "needs": list(some(("mla", "experts"))) if rng.random() < 0.2 else [],
        "positions": rng.choice((128, 256)),
        "eos_token_id": 2,
    }
    world = World(chips, backends, methods, speculators, family, model, Registries())
    register(world)
    return world, request(rng)


def register(world):
    registries = world.registries

    def put(registry, manifest, attribute):
        entry = Entry(
            manifest=manifest, target=f"{__name__}:{attribute}", plugin="p", distribution="dist-p", version="1"
        )
        registry.add(entry)

    for manifest, here, default in world.chips.values():
        put(registries.platforms, manifest, ("Here" if here else "Gone") + ("32" if default == "float32" else "16"))
    for registry, manifests, attribute in (
        (registries.attention, world.backends, "Attention"),
        (registries.quant, world.methods, "Quant"),
        (registries.spec_decoders, world.speculators, "Speculator"),
    ):
        for manifest in manifests.values():
            put(registry, manifest, attribute)
    put(registries.models, world.family, "Toy")


def request(rng):
    """Options that anyone might give."""

    calm = rng.choice((0.6, 0.95))

    def often(default, *values):
        return default if rng.random() < calm else rng.choice(values)

    return {
        "platform": often("auto", "one", "two"),
        "dtype": often("auto", *DTYPES),
        "attention": often("auto", "fast", "plain", "odd", "plian"),
        "kv_cache_dtype": often("auto", "fp8", "bfloat16"),
        "block_size": often(16, 32, 20),
        "max_model_len": often(None, 100, 300),
        "quantization": often(None, "tiny"),
        "speculative_config": often(None, {"method": "guess"}),
        "enable_chunked_prefill": often(True, False),
        "max_num_batched_tokens": often(2048, 90),
    }


def accepts(world, o):
    """The oracle: whether one request can be honoured, read off the declarations."""
    ranked = sorted(world.chips, key=lambda name: (-world.chips[name][0].priority, name))
    names = ranked if o.platform == "auto" else [o.platform]
    here = [world.chips[name] for name in names if name in world.chips and world.chips[name][1]]
    if not here:
        return False
    manifest, _, default = here[0]
    right = world.family.dtypes or DTYPES
    dtype = o.dtype
    if dtype == "auto":
        dtype = default if default in right else next((d for d in manifest.dtypes if d in right), None)
    length = o.max_model_len or world.model["positions"]
    if (
        dtype not in manifest.dtypes
        or dtype not in right
        or length > min(world.model["positions"], manifest.max_context or 10**9)
        or (not o.enable_chunked_prefill and o.max_num_batched_tokens < length)
        or (manifest.kv_dtypes and not stores(manifest.kv_dtypes, o.kv_cache_dtype, dtype))
    ):
        return False
    needs = set(world.model["needs"])
    method = world.methods.get(o.quantization or "none")
    if (
        method is None
        or (method.name != "none" and not method.on_load)
        or (method.dtypes and dtype not in method.dtypes)
        or (method.device_types and manifest.device_type not in method.device_types)
        or ("experts" in needs and not method.experts)
    ):
        return False
    needs -= {"experts"}
    needs |= {name for name in ("window", "soft_cap") if world.model[name] is not None}
    if o.speculative_config is not None:
        speculator = world.speculators.get(o.speculative_config["method"])
        if speculator is None or (speculator.device_types and manifest.device_type not in speculator.device_types):
            return False
        needs |= speculator.needs
    listed = manifest.attention if o.attention == "auto" else (o.attention,)
    backends = [world.backends[name] for name in listed if name in world.backends]
    return any(attends(world, backend, o, manifest, dtype, length, needs) for backend in backends)


def stores(kv_dtypes, wanted, dtype):
    return wanted in kv_dtypes or (wanted == dtype and "auto" in kv_dtypes)


def attends(world, backend, o, manifest, dtype, length, needs):
    able = {name for name in ("soft_cap", "mla", "tree", "verify") if getattr(backend, name)}
    able |= {"window"} if backend.sliding_window else set()
    return (
        manifest.device_type in backend.device_types
        and dtype in backend.dtypes
        and stores(backend.kv_dtypes, o.kv_cache_dtype, dtype)
        and (not backend.head_sizes or world.model["head_size"] in backend.head_sizes)
        and (not backend.block_sizes or o.block_size in backend.block_sizes)
        and length <= (backend.max_context or 10**9)
        and needs <= able
    )


def fewest_changes(world, options, facts):
    """By trying them all: how few changes make the request acceptable, up to 3; else None."""
    moves = [
        (name, value)
        for name in alternatives.OPTIONS
        for value in alternatives.values(name, options, world.registries, facts)
    ]
    given = dataclasses.asdict(options)
    for count in (1, 2, 3):
        for made in itertools.combinations(moves, count):
            if len({name for name, _ in made}) < count:
                continue
            if accepts(world, SimpleNamespace(**given | dict(made))):
                return count
    return None


@dataclasses.dataclass
class Drawn:
    """One world, one request, and what the resolver says to it."""

    seed: int
    world: World
    options: EngineOptions
    explanation: Explanation

    @property
    def suggested(self):
        """The options of the command line that the explanation names."""

        @click.command()
        @with_options(EngineOptions)
        def command(options):
            return options

        return command.main(args=list(self.explanation.nearest.arguments), standalone_mode=False)


@pytest.fixture(scope="module")
def all_drawn(tmp_path_factory):
    drawn = []
    for seed in SEEDS:
        world, given = draw(seed)
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(world.model))
        options = EngineOptions(model=str(folder), **given)
        drawn.append(Drawn(seed, world, options, explain(options, world.registries)))
    return drawn


@pytest.fixture(scope="module")
def improvable(all_drawn):
    """Those that are refused, and for which something was found."""
    return [drawn for drawn in all_drawn if drawn.explanation.nearest is not None]


def test_the_resolver_accepts_exactly_what_the_declarations_allow(all_drawn):
    accepted = 0
    for drawn in all_drawn:
        expected = accepts(drawn.world, drawn.options)
        assert (drawn.explanation.config is not None) == expected, (drawn.seed, drawn.explanation.reasons)
        assert bool(drawn.explanation.reasons) == (not expected)
        if expected:
            accepted += 1
            assert (drawn.explanation.nearest, drawn.explanation.tried) == (None, 0)
    assert len(SEEDS) // 10 < accepted < len(SEEDS) // 2, "the worlds are too kind, or too strict, to test anything"


def test_the_nearest_configuration_works_and_none_is_nearer(all_drawn):
    counts = set()
    for drawn in all_drawn:
        if drawn.explanation.config is not None:
            continue
        outcome = Case(drawn.options, drawn.world.registries).decide(drawn.options)
        fewest = fewest_changes(drawn.world, drawn.options, outcome.facts)
        nearest = drawn.explanation.nearest
        if nearest is None:
            assert fewest is None, drawn.seed
            continue
        assert len(nearest.changes) == (fewest or MAX_CHANGES), drawn.seed
        counts.add(len(nearest.changes))
        assert accepts(drawn.world, drawn.suggested), drawn.seed
        assert resolve(drawn.suggested, drawn.world.registries)
    assert {1, 2, 3} <= counts


def test_fallback_takes_the_nearest_and_says_so(improvable, caplog):
    for drawn in improvable[::4]:
        caplog.clear()
        taken = resolve(dataclasses.replace(drawn.options, allow_fallback=True), drawn.world.registries)
        assert taken.fallbacks == drawn.explanation.nearest.changes
        assert msgspec.structs.replace(taken, fallbacks=()) == resolve(drawn.suggested, drawn.world.registries)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * len(taken.fallbacks)
        for change, record in zip(taken.fallbacks, caplog.records, strict=True):
            text = record.getMessage()
            assert text.startswith(f"Fallback: {change.option} {change.asked} → {change.got}, since ")
            assert all(reason in text for reason in change.why)


def test_changes_are_what_differs_and_each_has_its_reasons(improvable):
    for drawn in improvable:
        changes = drawn.explanation.nearest.changes
        before, after = dataclasses.asdict(drawn.options), dataclasses.asdict(drawn.suggested)
        differing = {flag(name) for name in before if before[name] != after[name]}
        assert differing == {change.option for change in changes}
        assert all(change.why for change in changes)
        assert set(changes[0].why) <= set(drawn.explanation.reasons)


def test_beyond_the_bounds_the_defaults_are_taken_with_what_works_beside_them(improvable, monkeypatch):
    monkeypatch.setattr(search, "MAX_TRIED", 0)
    kept = changed = 0
    for drawn in improvable:
        explanation = explain(drawn.options, drawn.world.registries)
        defaults = EngineOptions(model=drawn.options.model)
        assert (explanation.nearest is not None) == accepts(drawn.world, defaults), drawn.seed
        if explanation.nearest is None:
            continue
        suggested = dataclasses.replace(drawn, explanation=explanation).suggested
        assert accepts(drawn.world, suggested), drawn.seed
        before, after = dataclasses.asdict(drawn.options), dataclasses.asdict(suggested)
        changes = {change.option: change for change in explanation.nearest.changes}
        assert {flag(name) for name in before if before[name] != after[name]} == set(changes)
        assert all(change.why for change in changes.values())
        changed += len(changes)
        kept += sum(before[name] == after[name] != value for name, value in dataclasses.asdict(defaults).items())
    assert kept > 20
    assert changed > 20


def test_the_search_ends_at_its_bounds(improvable, monkeypatch):
    drawn = next(drawn for drawn in improvable if drawn.explanation.tried > 3)
    monkeypatch.setattr(search, "MAX_TRIED", 3)
    monkeypatch.setattr(search.Search, "_from_defaults", lambda self: None)
    with pytest.raises(ResolutionError) as caught:
        resolve(drawn.options, drawn.world.registries)
    assert caught.value.nearest == "Nearest that works: none found (3 others tried)."
    assert str(caught.value).endswith(f"\n{caught.value.nearest}")
    monkeypatch.setattr(search, "MAX_SECONDS", -1.0)
    assert explain(drawn.options, drawn.world.registries).tried == 0
