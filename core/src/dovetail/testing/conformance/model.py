"""Model families: what :class:`dovetail.contracts.model.Model` promises.

A checkpoint with random weights is made from the tensors that the family declares, and the model is run on it alone
(with dense attention in float64 instead of an engine) and in an engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dovetail.contracts.model import Model, ModelContext, ModelFacts
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear
from dovetail.errors import ConfigError
from dovetail.layers.block import Block
from dovetail.layers.linear import Unquantized
from dovetail.ops import reference as reference_ops
from dovetail.testing.conformance.checkpoints import declared, random_tensors, write_checkpoint
from dovetail.testing.conformance.dense import PADDING, DenseModel, Part
from dovetail.testing.conformance.known_architectures import known_logits, small_config, why_unknown
from dovetail.testing.conformance.small_engine import generate, model_config, reference_platform
from dovetail.testing.conformance.suite import Suite

MAX_MODEL_LEN = 96
EXACT = 2e-5
"""Largest error, relative to the largest logit, of float32 results that differ in the order of summation alone."""
REFERENCE = 1e-4
"""The same against an independent implementation."""
ROUNDED = 0.1
"""Largest error of bfloat16 logits, root mean square relative to float32's."""
JUNK: tuple[Any, ...] = ("junk", ["junk"], -1)
"""Values that hardly any field of a config.json may have."""


class ModelSuite(Suite):
    """Holds a model family to its contract.

    Attributes:
        hf_config: config.json of a tiny checkpoint: complete if it names ``architectures``; else changes to a small
            config of the manifest's first architecture as transformers knows it.
    """

    contract: ClassVar[str] = "model"
    kind: ClassVar[str] = "models"
    hf_config: ClassVar[Mapping[str, Any]] = {}

    @staticmethod
    def reference(folder: Path, token_ids: Sequence[int]) -> Tensor | None:
        """Float32 logits ``[T, V]`` of an independent implementation for the checkpoint in ``folder``.

        The default asks transformers, and answers None if it is not installed or does not know the architecture.
        """
        return known_logits(folder, token_ids)

    @pytest.fixture
    def config(self) -> dict[str, Any]:
        """config.json of the tiny checkpoint."""
        if "architectures" in self.hf_config:
            return copy.deepcopy(dict(self.hf_config))
        made = small_config(self.manifest.architectures[0], self.hf_config)
        if made is None:
            self.lacks(f"hf_config ({why_unknown(self.manifest.architectures[0])})")
        assert made is not None
        return made

    @pytest.fixture
    def folder(self, config: dict[str, Any], tmp_path: Path) -> Path:
        """The tiny checkpoint."""
        tensors = random_tensors(self._built(config))
        return write_checkpoint(tmp_path / "checkpoint", config, tensors)

    @pytest.fixture
    def model(self, config: dict[str, Any], folder: Path) -> DenseModel:
        """The model of the tiny checkpoint, in float32 on the reference operations."""
        return self._loaded(config, folder)

    def test_facts_are_a_function_of_the_config(self, config: dict[str, Any]) -> None:
        """model.1: facts answer the same every time, with sane values, and neither they nor the constructor change the
        config or global state.
        """
        given, state, dtype = copy.deepcopy(config), torch.get_rng_state(), torch.get_default_dtype()
        facts = [_plain(self._family.facts(config)) for _ in range(2)]
        self._built(config)
        self.equal(facts[1], facts[0], "facts of the same config")
        self.equal(config, given, "config.json after reading it")
        self.check(torch.equal(torch.get_rng_state(), state), "the state of torch's random numbers changed.")
        self.equal(torch.get_default_dtype(), dtype, "torch's default dtype")
        self._check_facts(self._family.facts(config))

    def test_missing_fields(self, config: dict[str, Any]) -> None:
        """model.2: a config.json without some field is read with a default, or refused with a ConfigError naming it."""
        for path in _paths(config):
            changed = copy.deepcopy(config)
            del _section(changed, path)[path[-1]]
            self._accepts_or_names(changed, path[-1], f"config.json without {'.'.join(path)}")

    def test_wrong_fields(self, config: dict[str, Any]) -> None:
        """model.3: a field with an absurd value is not read at all, or refused with a ConfigError that names it."""
        for path in _paths(config):
            for junk in JUNK:
                changed = copy.deepcopy(config)
                _section(changed, path)[path[-1]] = junk
                self._accepts_or_names(changed, path[-1], f"config.json with {'.'.join(path)} = {junk!r}")

    def test_layers_attend_as_declared(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.4: a step attends once per layer of the facts, in order, with that layer's heads and head size."""
        model.hidden(Part(0, _tokens(5, self._vocab(config))))
        expected = [
            (layer, (5, s.num_heads, s.head_size), (5, s.num_kv_heads, s.head_size), (5, s.num_kv_heads, s.head_size))
            for layer, s in enumerate(self._family.facts(config).attention)
        ]
        self.equal(model.attention.calls, expected, "layers that attended, with the shapes of q, k and v")

    def test_tensors_live_in_blocks(self, config: dict[str, Any]) -> None:
        """model.5: every tensor of the checkpoint is declared by a block, under a name of its own; nothing is allocated
        before loading.
        """
        model = self._built(config)
        self.equal([name for name, _ in model.named_parameters()], [], "parameters outside of blocks")
        names = [tensor.name for tensor in declared(model)]
        self.check(bool(names), "no block declares a tensor.")
        self.equal(sorted({name for name in names if names.count(name) > 1}), [], "checkpoint names of several tensors")

    def test_loading_fills_everything(self, model: DenseModel) -> None:
        """model.6: a checkpoint with exactly the declared tensors loads, and leaves no block unfilled."""
        blocks = {name: m for name, m in model.model.named_modules() if isinstance(m, Block)}
        self.equal([name for name, block in blocks.items() if block.specs], [], "blocks that were not filled")

    def test_every_tensor_matters(self, config: dict[str, Any], folder: Path, tmp_path: Path) -> None:
        """model.7: another value of any one tensor of the checkpoint gives other logits."""
        prompt = _tokens(80, self._vocab(config))  # long enough for a router to choose every expert
        expected = self._loaded(config, folder).logits(prompt)
        tensors = random_tensors(self._built(config))
        for name, tensor in tensors.items():
            other = write_checkpoint(tmp_path / "other", config, {**tensors, name: tensor.flip(0) + 0.5})
            got = self._loaded(config, other).logits(prompt)
            self.check(not torch.equal(got, expected), f"{name} is loaded, but no logit depends on it.")

    def test_tied_tensors(self, config: dict[str, Any], folder: Path, tmp_path: Path) -> None:
        """model.8: a tied tensor that the checkpoint leaves out equals the one it is tied to; a stored one is used."""
        model = self._built(config)
        tied = model.weight_table().tied
        if not tied:
            self.lacks("tied weights")
        prompt = _tokens(9, self._vocab(config))
        tensors = random_tensors(model)
        self.equal(sorted(set(tied.values()) - set(tensors)), [], "tensors that others are tied to and nobody declares")
        stored = {name: tensors[source] for name, source in tied.items()}
        expected = self._loaded(config, folder).logits(prompt)
        both = write_checkpoint(tmp_path / "both", config, {**tensors, **stored})
        self.near(self._loaded(config, both).logits(prompt), expected, "logits with the tied tensor stored too", EXACT)
        other = {name: tensor.flip(0) for name, tensor in stored.items()}
        own = write_checkpoint(tmp_path / "own", config, {**tensors, **other})
        got = self._loaded(config, own).logits(prompt)
        self.check(not torch.allclose(got, expected), f"a checkpoint's own {', '.join(other)} is not used.")

    def test_spellings_of_other_exports(self, config: dict[str, Any], folder: Path, tmp_path: Path) -> None:
        """model.9: prefixes that the weight table strips, and tensors that it ignores, change nothing."""
        table = self._built(config).weight_table()
        if not table.strip_prefixes and not table.ignore:
            self.lacks("strip_prefixes and ignore")
        prompt = _tokens(9, self._vocab(config))
        expected = self._loaded(config, folder).logits(prompt)
        tensors = random_tensors(self._built(config))
        for prefix in ("", *(f"{prefix.rstrip('.')}." for prefix in table.strip_prefixes)):
            renamed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
            renamed |= {f"{prefix}extra.{part}.extra": torch.ones(2) for part in table.ignore}
            other = write_checkpoint(tmp_path / "other", config, renamed)
            got = self._loaded(config, other).logits(prompt)
            self.near(got, expected, f"logits with prefix {prefix!r} and ignored tensors", EXACT)

    def test_shapes_and_dtypes(self, config: dict[str, Any], folder: Path) -> None:
        """model.10: hidden states are [T, D] and logits [S, V], in the activation dtype, for any T and S."""
        for dtype in self._dtypes():
            model = self._loaded(config, folder, dtype=dtype)
            for tokens, rows in ((1, 1), (7, 3), (7, 0)):
                hidden = model.hidden(Part(tokens, _tokens(tokens, self._vocab(config))))
                logits = model.model.logits(hidden[:rows])
                what = f"for {tokens} tokens, {rows} rows and {dtype}"
                self.equal((hidden.ndim, len(hidden)), (2, tokens), f"dimensions and rows of hidden states {what}")
                self.equal(tuple(logits.shape), (rows, self._vocab(config)), f"shape of logits {what}")
                self.equal((hidden.dtype, logits.dtype), (dtype, dtype), f"dtypes of hidden states and logits {what}")

    def test_causality(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.11: a token changes its own row and later ones, never an earlier one."""
        vocab = self._vocab(config)
        prompt = _tokens(12, vocab)
        expected = model.logits(prompt)
        for place in (0, 5, 11):
            changed = list(prompt)
            changed[place] = (changed[place] + 1) % vocab
            got = model.logits(changed)
            if place:
                self.near(got[:place], expected[:place], f"logits before token {place}, which was changed", EXACT)
            row_is_other = not torch.allclose(got[place], expected[place])
            self.check(row_is_other, f"logits at token {place} do not depend on that token.")

    def test_chunks(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.12: a prompt computed in chunks of any size gives the logits of one step."""
        prompt = _tokens(24, self._vocab(config))
        expected = model.logits(prompt)
        for sizes in ((1,) * 24, (11, 13), (16, 1, 1, 6)):
            model.forget()
            chunks = torch.split(torch.tensor(prompt), list(sizes))
            got = torch.cat([model.step(Part(0, chunk.tolist()))[0] for chunk in chunks])
            self.near(got, expected, f"logits of chunks of {sizes} tokens", EXACT)

    def test_ragged_batches(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.13: requests that share steps, each at its own position, get the logits that they get alone."""
        prompts = [_tokens(length, self._vocab(config), seed) for seed, length in enumerate((9, 4, 17))]
        alone = [model.logits(prompt) for prompt in prompts]
        first, second, third = prompts
        model.forget()
        rows: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
        for parts in (
            [Part(2, third[:5]), Part(0, first[:8])],
            [Part(0, first[8:]), Part(1, second), Part(2, third[5:16])],
            [Part(2, third[16:])],
        ):
            for part, logits in zip(parts, model.step(*parts), strict=True):
                rows[part.request].append(logits)
        for request, expected in enumerate(alone):
            self.near(torch.cat(rows[request]), expected, f"logits of request {request} in a batch", EXACT)

    def test_padding(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.14: padding tokens, all at position 0, change no other row, whatever attention returns for them."""
        prompt = _tokens(9, self._vocab(config))
        expected = model.logits(prompt)
        for padding in (1, 23):
            model.forget()
            got = model.step(Part(0, prompt), Part(PADDING, [0] * padding))[0]
            self.near(got, expected, f"logits beside {padding} padding tokens", EXACT)

    def test_logits_of_some_rows(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.15: logits of some rows of the hidden states, in any order, are those rows of all logits."""
        prompt = _tokens(9, self._vocab(config))
        expected = model.logits(prompt)
        model.forget()
        hidden = model.hidden(Part(0, prompt))
        for rows in ([8], [3, 0, 3], list(range(9))):
            with torch.inference_mode():
                got = model.model.logits(hidden[rows])
            self.near(got, expected[rows], f"logits of rows {rows}", EXACT)

    def test_steps_leave_nothing_behind(self, config: dict[str, Any], model: DenseModel) -> None:
        """model.16: a step depends on its inputs alone, and does not change them."""
        vocab = self._vocab(config)
        prompt = torch.tensor(_tokens(7, vocab), device=self._context.device)
        positions = torch.arange(7, device=self._context.device)
        given = prompt.clone(), positions.clone()
        outputs: list[Tensor] = []
        for _ in range(2):
            model.forget()
            model.attention.begin([Part(0, prompt.tolist())])
            with torch.inference_mode():
                outputs.append(model.model.forward(prompt, positions, model.attention).clone())
            model.logits(_tokens(20, vocab, seed=5))
        unchanged = torch.equal(prompt, given[0]) and torch.equal(positions, given[1])
        self.check(unchanged, "the forward pass changed its token ids or positions.")
        self.check(torch.equal(outputs[0], outputs[1]), "the same step gave other hidden states the second time.")

    def test_last_position(self, config: dict[str, Any], folder: Path) -> None:
        """model.17: every position below max_model_len works, and max_model_len itself changes nothing."""
        prompt = _tokens(33, self._vocab(config))
        expected = self._loaded(config, folder).logits(prompt)
        got = self._loaded(config, folder, max_model_len=33).logits(prompt)
        self.near(got, expected, "logits with max_model_len 33 of 33 tokens", EXACT)

    def test_bfloat16(self, config: dict[str, Any], folder: Path) -> None:
        """model.18: bfloat16 logits are float32's, up to rounding."""
        if torch.bfloat16 not in self._dtypes():
            self.lacks("bfloat16")
        prompt = _tokens(24, self._vocab(config))
        expected = self._loaded(config, folder).logits(prompt)
        got = self._loaded(config, folder, dtype=torch.bfloat16).logits(prompt).float()
        error = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        self.check(error < ROUNDED, f"bfloat16 logits are off by {error:.3f} (root mean square), allowed {ROUNDED}.")

    def test_any_device(self, config: dict[str, Any], folder: Path) -> None:
        """model.19: everything lives on the context's device, and no step reads a value back from it.

        Runs on torch's meta device, which has shapes but no values.
        """
        meta = torch.device("meta")
        try:
            model = self._loaded(config, folder, device=meta, ops=OpTable(moe_experts=_experts_of_meta))
            hidden = model.hidden(Part(0, _tokens(5, self._vocab(config))))
            logits = model.model.logits(hidden)
        except (RuntimeError, NotImplementedError) as error:
            self.fail(f"the model does not run on the meta device: {error}")
        self.equal((hidden.device, logits.device), (meta, meta), "devices of hidden states and logits")

    def test_number_formats_see_every_layer(self, config: dict[str, Any], folder: Path) -> None:
        """model.20: linear layers are offered to the number format, each by the dotted name of its module, and run by
        it.
        """
        quant = _Doubled()
        model = self._loaded(config, folder, quant=quant)
        modules = dict(model.model.named_modules())
        strangers = [name for name in quant.asked if name not in modules]
        self.equal(strangers, [], "names that the number format was asked about and that no module has")
        self.equal(sorted({n for n in quant.asked if quant.asked.count(n) > 1}), [], "names that several layers share")
        self.check(bool(quant.asked), "the number format was asked about no layer at all.")
        prompt = _tokens(9, self._vocab(config))
        expected = self._loaded(config, folder).logits(prompt)
        self.near(model.logits(prompt), expected, "logits with an exact number format", EXACT)
        self.check(quant.applied > 0, "no layer ran through the number format.")

    def test_plain_layers_beside_a_number_format(self, config: dict[str, Any], folder: Path) -> None:
        """model.21: a number format that applies to no layer leaves the model as it is."""
        prompt = _tokens(9, self._vocab(config))
        expected = self._loaded(config, folder).logits(prompt)
        got = self._loaded(config, folder, quant=_Doubled(applies=False)).logits(prompt)
        self.near(got, expected, "logits with a number format that applies to no layer", EXACT)

    def test_packed_weights_are_opaque(self, config: dict[str, Any], folder: Path) -> None:
        """model.22: weights that the platform packed are read by the operations of the same table alone."""
        prompt = _tokens(9, self._vocab(config))
        expected = self._loaded(config, folder).logits(prompt)
        try:
            got = self._loaded(config, folder, ops=_opaque_ops()).logits(prompt)
        except (TypeError, AttributeError) as error:
            self.fail(f"the model reads packed weights itself: {error}")
        self.near(got, expected, "logits with opaque packed weights", EXACT)

    @pytest.mark.parametrize("platform", ["ReferencePlatform", "LadderPlatform"])
    def test_engine(self, platform: str, config: dict[str, Any], folder: Path, model: DenseModel) -> None:
        """model.23: an engine with chunked prefill, a prefix cache, small pages and several requests generates the
        greedy tokens of the dense model, with and without padded steps.
        """
        vocab, lengths = self._vocab(config), (1, 30, 7, 33)
        prompts = [_tokens(length, vocab, seed) for seed, length in enumerate(lengths)]
        prompts[3][:28] = prompts[1][:28]
        selected = model_config(self.tested.selection, config, folder, self._family.facts(config), platform=platform)
        outputs = generate(selected, prompts, max_tokens=10)
        for prompt, output in zip(prompts, outputs, strict=True):
            self.equal(output, model.greedy(prompt, 10), f"greedy tokens after a prompt of {len(prompt)} tokens")

    @pytest.mark.parametrize("length", [1, 40])
    def test_reference(self, length: int, config: dict[str, Any], folder: Path, model: DenseModel) -> None:
        """model.24: logits equal those of an independent implementation."""
        prompt = _tokens(length, self._vocab(config))
        expected = self.reference(folder, prompt)
        if expected is None:
            self.lacks(f"reference ({why_unknown(config['architectures'][0])})")
        assert expected is not None
        self.near(model.logits(prompt), expected, f"logits of {length} tokens", REFERENCE)

    @property
    def _family(self) -> type[Model]:
        family: type[Model] = self.tested.cls
        return family

    @property
    def _context(self) -> ModelContext:
        device, ops = reference_platform(self.manifest.platform)
        return ModelContext(
            ops=ops, dtype=torch.float32, device=device, quant=Unquantized(), max_model_len=MAX_MODEL_LEN
        )

    def _built(self, config: Mapping[str, Any]) -> Model:
        """The model before loading."""
        with torch.inference_mode():
            return self._family(config, self._context)

    def _loaded(self, config: Mapping[str, Any], folder: Path, **changes: Any) -> DenseModel:
        """The model of a checkpoint; ``changes`` are fields of the context."""
        return DenseModel(self._family, config, folder, replace(self._context, **changes))

    def _vocab(self, config: Mapping[str, Any]) -> int:
        return self._family.facts(config).vocab_size

    def _dtypes(self) -> list[torch.dtype]:
        """Activation dtypes that the reference operations know and the manifest allows."""
        known = ("float32", "bfloat16")
        return [getattr(torch, name) for name in known if name in (self.manifest.dtypes or known)]

    def _check_facts(self, facts: ModelFacts) -> None:
        for field, value in (("vocab_size", facts.vocab_size), ("max_positions", facts.max_positions)):
            self.check(isinstance(value, int) and value > 0, f"{field} is {value!r}, not a positive integer.")
        is_float = isinstance(facts.dtype, torch.dtype) and facts.dtype.is_floating_point
        self.check(is_float, f"dtype is {facts.dtype!r}, not a floating-point dtype.")
        self.check(len(facts.attention) > 0, "there is no layer.")
        for layer, spec in enumerate(facts.attention):
            divides = min(spec.num_heads, spec.num_kv_heads) > 0 and spec.num_heads % spec.num_kv_heads == 0
            self.check(divides, f"layer {layer}: {spec.num_kv_heads} KV heads do not divide {spec.num_heads} heads.")
            sizes = [spec.head_size, spec.scale, spec.window or 1, spec.soft_cap or 1]
            self.check(min(sizes) > 0, f"layer {layer}: {spec} has a size, scale, window or cap that is not positive.")

    def _accepts_or_names(self, config: dict[str, Any], field: str, what: str) -> None:
        """Reading and building must succeed, or end with a ConfigError that names the field."""
        try:
            facts = self._family.facts(config)
            if facts.vocab_size < 1 << 20:
                self._built(config)
        except ConfigError as error:
            self.check(field in str(error), f"{what}: the refusal does not name {field!r}: {error}")
        except Exception as error:  # noqa: BLE001  whatever else a plugin raises is what this looks for
            self.fail(f"{what}: expected a ConfigError that names {field!r}, got {type(error).__name__}: {error}")


def _tokens(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def _plain(facts: ModelFacts) -> dict[str, Any]:
    values = {field.name: getattr(facts, field.name) for field in fields(facts)}
    return {**values, "attention": list(facts.attention)}


def _paths(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Fields of a config, and those of its sections."""
    for name, value in config.items():
        if name == "architectures":  # read by the resolver, not by the family
            continue
        yield (name,)
        if isinstance(value, Mapping):
            yield from ((name, *path) for path in _paths(value))


def _section(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for name in path[:-1]:
        config = config[name]
    return config


class _Doubled(Unquantized):
    """An exact number format: weights twice as large, inputs half as large. Notes what it is used for."""

    def __init__(self, *, applies: bool = True) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.applied = 0
        self._applies = applies

    def applies_to(self, layer: str) -> bool:
        """All layers or none."""
        self.asked.append(layer)
        return self._applies

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Exact in binary floating point."""
        return [2 * tensors["weight"]]

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """The plain product."""
        self.applied += 1
        return reference_ops.linear(x_TI / 2, packed[0], bias_O)


def _experts_of_meta(x_TD: Tensor, gate_up: Any, down: Any, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


class _Opaque:
    """Packed weights in which nobody can read."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed


def _opaque_ops() -> OpTable:
    def packing(pack: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: _Opaque(pack(*tensors))

    def linear(x_TI: Tensor, packed: _Opaque, bias_O: Tensor | None = None) -> Tensor:
        return reference_ops.linear(x_TI, packed.packed, bias_O)

    def experts(x_TD: Tensor, gate_up: _Opaque, down: _Opaque, *routing: Any) -> Tensor:
        return reference_ops.moe_experts(x_TD, gate_up.packed, down.packed, *routing)

    return OpTable(
        linear_pack=packing(reference_ops.linear_pack),
        linear=linear,
        experts_pack=packing(reference_ops.experts_pack),
        moe_experts=experts,
    )
