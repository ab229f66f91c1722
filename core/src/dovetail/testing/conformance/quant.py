"""The conformance suite of number formats."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import QuantMethod, TensorSpec
from dovetail.errors import ConfigError
from dovetail.layers.experts import Experts
from dovetail.layers.linear import Linear, Unquantized
from dovetail.ops import reference
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.checkpoints import declared, write_checkpoint
from dovetail.testing.conformance.dense import DenseModel
from dovetail.testing.conformance.experts_probe import EXPERTS, load_experts
from dovetail.testing.conformance.linear_probe import (
    MERGED,
    PARTS,
    SINGLE,
    LinearProbe,
    Watched,
    held_bytes,
    load_probe,
    spying_ops,
)
from dovetail.testing.conformance.small_engine import core_part, generate, model_config
from dovetail.testing.conformance.suite import TOLERANCE, Suite, needs

Section = Mapping[str, Any] | None
"""A checkpoint's ``quantization_config``; None where plain weights are quantized on load."""

SIZES = ((64, 96), (128, 256), (160, 24), (32, 1), (100, 7))
"""Input and output features of layers."""
JUNK: tuple[Any, ...] = ("junk", ["junk"], -1)
"""Values that hardly any field of a ``quantization_config`` may have."""
PLAIN_OPS = frozenset({"linear", "linear_pack"})
"""Operations that a method may use without declaring them: every platform runs plain layers."""


class QuantSuite(Suite):
    """Holds a number format to its contract.

    Attributes:
        sections: every kind of ``quantization_config`` that it reads; none if it quantizes on load alone.
        error: a tighter bound than the manifest's ``error``.
    """

    contract: ClassVar[str] = "quant"
    kind: ClassVar[str] = "quant"
    sections: ClassVar[Sequence[Mapping[str, Any]]] = ()
    error: ClassVar[float | None] = None

    @staticmethod
    def store(weight_OI: Tensor, section: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """What a checkpoint holds for one layer (one part of a merged one) of these float32 weights, by suffix.

        Needed together with ``sections``; None leaves out what needs such a checkpoint.
        """
        return None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests that take a ``section`` on load and for each of ``sections``; those with a ``dtype``, for each."""
        if "section" in metafunc.fixturenames:
            plain = self.manifest.on_load or not self.sections
            names = ["plain"] if plain else []
            names += [f"checkpoint {i + 1}" for i in range(len(self.sections))]
            metafunc.parametrize("section", [*([None] if plain else []), *self.sections], ids=names)
        if "dtype" in metafunc.fixturenames:
            known = ("float32", "bfloat16")
            allowed = [name for name in known if name in (self.manifest.dtypes or known)]
            metafunc.parametrize("dtype", [getattr(torch, name) for name in allowed], ids=allowed)

    # ---- sections

    def test_recognises_its_own_sections(self) -> None:
        """quant.1: a section is recognised if and only if it is of the format, and is not changed."""
        for section in self.sections:
            given = copy.deepcopy(dict(section))
            self.check(self.tested.cls.recognises(given) is True, f"{section!r} is not recognised.")
            self.equal(given, dict(section), "the section after recognises()")
            method = section.get("quant_method")
            self.check(method in self.manifest.checkpoint_methods, f"{method!r} is not among checkpoint_methods.")
        for foreign in ({}, {"quant_method": "conformance"}, {"quant_method": None}, {"bits": 4}):
            answer = self.tested.cls.recognises(foreign)
            self.check(answer is False, f"recognises({foreign!r}) is {answer!r}, though it is of another format.")

    def test_wrong_fields(self) -> None:
        """quant.2: a section with an absurd or a missing field is read all the same, or refused with a ConfigError that
        names it.
        """
        if not self.sections:
            self.lacks("sections")
        for section in self.sections:
            for field in section:
                for junk in JUNK:
                    self._accepts_or_names({**section, field: junk}, field)
                self._accepts_or_names({name: value for name, value in section.items() if name != field}, field)

    def test_applies_to_layers_by_name(self, section: Section) -> None:
        """quant.3: applies_to answers each name with true or false, always the same, and does apply to something."""
        methods = [self._method(section), self._method(section)]
        for name in (MERGED, SINGLE, "lm_head", "model.layers.11.mlp.gate", "model.layers.3.mlp.experts"):
            answers = [method.applies_to(name) for method in (*methods, methods[0])]
            self.check(isinstance(answers[0], bool), f"applies_to({name!r}) is {answers[0]!r}, not true or false.")
            self.equal(answers[1:], answers[:1] * 2, f"applies_to({name!r}), asked again")
        for name in (MERGED, SINGLE):
            self.check(methods[0].applies_to(name), f"applies_to({name!r}) is false: no ordinary layer is quantized.")

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_tensors(self, size: tuple[int, int], section: Section) -> None:
        """quant.4: tensors describes a layer of any size by positive shapes and output dimensions that grow with it, or
        refuses one that is odd with a ConfigError that names its inputs or outputs.
        """
        in_features, out_features = size
        if not self._takes(section, size):
            return
        specs = self._method(section).tensors(in_features, out_features, torch.float32)
        self.check(bool(specs), f"a layer of {size} has no tensors.")
        self.check("bias" not in specs, "'bias' is the layer's own.")
        for suffix, spec in specs.items():
            self._check_spec(suffix, spec, out_features)
        if section is None:
            plain = {"weight": ((out_features, in_features), torch.float32)}
            got = {suffix: (spec.shape, spec.dtype) for suffix, spec in specs.items() if not spec.optional}
            self.equal(got, plain, "tensors of a layer that is quantized on load")

    # ---- products

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_product(self, size: tuple[int, int], dtype: torch.dtype, section: Section, tmp_path: Path) -> None:
        """quant.5: a layer of any size that is not refused, loaded from a checkpoint, gives the exact product up to the
        format's error, in the dtype of the input.
        """
        if not self._takes(section, size):
            return
        in_features, out_features = size
        weight = _normal(out_features, in_features)
        layer = self._layer(tmp_path, section, [weight], dtype)
        for rows in (0, 1, 64):
            x = _normal(rows, in_features, seed=1).to(dtype)
            got = layer(x)
            what = f"product of {rows} rows with a layer of {size}"
            self.equal((tuple(got.shape), got.dtype), ((rows, out_features), dtype), f"shape and dtype of the {what}")
        self._accurate(got, x.double() @ weight.double().t(), what, dtype)

    @pytest.mark.parametrize("outputs", [(64, 32, 32), (40, 24, 7), (128, 128, 256)], ids=str)
    def test_merged_layers(self, outputs: tuple[int, ...], section: Section, tmp_path: Path) -> None:
        """quant.6: parts that are loaded into one merged layer give, side by side, what each gives on its own."""
        if not self._takes(section, (64, sum(outputs))):
            return
        weights = [_normal(size, 64, seed=i, scale=2.0**i) for i, size in enumerate(outputs)]
        x = _normal(64, 64, seed=9)
        merged = torch.split(self._layer(tmp_path, section, weights)(x), list(outputs), dim=1)
        for name, weight, got in zip(PARTS, weights, merged, strict=True):
            self._accurate(got, x.double() @ weight.double().t(), f"part {name} of a merged layer")

    def test_bias(self, dtype: torch.dtype, section: Section, tmp_path: Path) -> None:
        """quant.7: the bias is added as it is, to every row and to each part of a merged layer."""
        weights = [_normal(size, 64, seed=i) for i, size in enumerate((64, 32, 32))]
        x = _normal(5, 64, seed=9).to(dtype)
        bias = torch.linspace(-50, 50, 128)
        without = self._layer(tmp_path, section, weights, dtype)(x)
        got = self._layer(tmp_path, section, weights, dtype, bias=bias)(x)
        self.close(got, without.double() + bias.to(dtype).double(), "product plus bias", dtype=dtype)

    def test_rows_are_independent(self, dtype: torch.dtype, section: Section, tmp_path: Path) -> None:
        """quant.8: a row gives the same alone and beside any others, however large they are."""
        layer = self._layer(tmp_path, section, [_normal(96, 64)], dtype)
        x = _normal(5, 64, seed=1).to(dtype)
        alone = torch.cat([layer(row.unsqueeze(0)) for row in x])
        self.close(layer(x), alone.double(), "rows in a batch", dtype=dtype)
        crowd = torch.cat([1000 * x[:1], x, torch.zeros_like(x[:1]), -300 * x[1:2]])
        self.close(layer(crowd)[1:6], alone.double(), "rows beside much larger ones and zeros", dtype=dtype)

    @pytest.mark.parametrize("magnitude", [1e-4, 1e3], ids=str)
    def test_magnitudes(self, magnitude: float, section: Section, tmp_path: Path) -> None:
        """quant.9: the error is relative: weights of any magnitude, and inputs that were not calibrated, keep it."""
        weight, x = _normal(96, 64), _normal(5, 64, seed=1)
        got = self._layer(tmp_path / "weights", section, [magnitude * weight])(x)
        self._accurate(got, magnitude * x.double() @ weight.double().t(), f"product with weights of {magnitude:g}")
        if section is None:
            got = self._layer(tmp_path / "inputs", section, [weight])(magnitude * x)
            self._accurate(got, magnitude * x.double() @ weight.double().t(), f"product with inputs of {magnitude:g}")

    def test_extremes(self, dtype: torch.dtype, section: Section, tmp_path: Path) -> None:
        """quant.10: zeros give zeros, and zeros, outliers and denormal numbers give finite results."""
        weight = _normal(96, 64)
        weight[0] = 0.0
        weight[1] = 1e-39
        weight[2, 3] = 1e4
        x = torch.cat([_normal(3, 64, seed=1), torch.zeros(1, 64), torch.full((1, 64), 1e-39), _normal(1, 64) * 1e4])
        got = self._layer(tmp_path / "some", section, [weight], dtype)(x.to(dtype))
        self.check(bool(got.isfinite().all()), f"{int((~got.isfinite()).sum())} results are not finite.")
        self.check(not got[:, 0].any(), "an output whose weights are all zero is not zero.")
        self.check(not got[3].any(), "a row of zeros does not give zeros.")
        nothing = self._layer(tmp_path / "all", section, [torch.zeros(96, 64)], dtype)(x.to(dtype))
        self.check(not nothing.any(), "weights that are all zero do not give zeros.")

    def test_views(self, section: Section, tmp_path: Path) -> None:
        """quant.11: inputs may be views with strides, and are not changed."""
        layer = self._layer(tmp_path, section, [_normal(96, 64)])
        wide = _normal(10, 192, seed=1)
        given = wide.clone()
        view = wide[::2, 64:128]
        got, expected = layer(view), layer(view.contiguous())
        self.close(got, expected.double(), "product of a view", dtype=torch.float32)
        self.check(torch.equal(wide, given), "apply changed its input.")

    def test_repeats(self, section: Section, tmp_path: Path) -> None:
        """quant.12: the same layer and input give the same bits every time, whatever other layers exist."""
        x = _normal(5, 64, seed=1)
        method = self._method(section)
        first = self._layer(tmp_path / "first", section, [_normal(96, 64)], method=method)
        expected = first(x)
        other = self._layer(tmp_path / "other", section, [_normal(96, 64, seed=3)], method=method)
        other(_normal(2, 64, seed=4))
        self.check(torch.equal(first(x), expected), "the second product differs from the first.")
        again = self._layer(tmp_path / "again", section, [_normal(96, 64)])
        self.check(torch.equal(again(x), expected), "a second layer of the same weights gives another product.")

    def test_rows_quantized_before(self, dtype: torch.dtype, section: Section, tmp_path: Path) -> None:
        """quant.18: a method that takes quantized rows makes of them what it makes of the wide ones, bias included."""
        method, bias, x = self._method(section), torch.linspace(-50, 50, 96), _normal(5, 64, seed=1).to(dtype)
        product, watched = method.row_product(), Watched(method)
        if product is None:
            self.lacks("a product with quantized rows")
            return
        expected = self._layer(tmp_path, section, [_normal(96, 64)], dtype, bias=bias, method=watched)(x)
        ops = OpTable()
        rows = ops.quantize_rows(x, *product.format)
        got = product.apply(*rows, watched.packed, bias.to(dtype), dtype, ops)
        self.close(got, expected.double(), "the product with quantized rows", dtype=dtype)

    # ---- loading

    def test_loaded_tensors_are_only_read(self, section: Section, tmp_path: Path) -> None:
        """quant.13: prepare does not change the tensors that it gets."""
        watched = Watched(self._method(section))
        self._layer(tmp_path, section, [_normal(96, 64)], method=watched)
        for suffix, tensor in watched.loaded.items():
            same = torch.equal(tensor.view(torch.uint8), watched.untouched[suffix].view(torch.uint8))
            self.check(same, f"prepare changed the loaded {suffix!r}.")

    def test_loaded_tensors_are_let_go(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """quant.14: a layer that was quantized on load holds no more bytes than its plain weights took."""
        if not self.manifest.on_load:
            self.lacks("on_load")
        watched = Watched(self._method(None))
        self._layer(tmp_path, None, [_normal(256, 128)], dtype, method=watched)
        held, loaded = held_bytes(watched.packed), held_bytes(watched.loaded)
        self.check(held <= loaded, f"the layer holds {held} bytes; its plain {dtype} weights took {loaded}.")

    def test_operations_are_declared(self, section: Section, tmp_path: Path) -> None:
        """quant.15: only operations of the manifest are used (and plain products), and packed weights are read by them
        alone.
        """
        self.equal(sorted(self.manifest.ops - OpTable.names()), [], "operations of the manifest that do not exist")
        used: set[str] = set()
        try:
            layer = self._layer(tmp_path, section, [_normal(96, 64)], ops=spying_ops(OpTable(), used))
            layer(_normal(5, 64, seed=1))
        except (TypeError, AttributeError) as error:
            self.fail(f"packed weights are read by something else than an operation of the table: {error}")
        undeclared = sorted(used - self.manifest.ops - PLAIN_OPS)
        self.equal(undeclared, [], "operations that were used and that the manifest does not list")

    # ---- models

    def test_engine(self, section: Section, tmp_path: Path) -> None:
        """quant.16: a quantized model generates in an engine, with chunked prefill and a prefix cache, the greedy
        tokens that the same model gives alone.
        """
        config, folder = self._tiny_checkpoint(section, tmp_path)
        dense = DenseModel(tiny.TinyModel, config, folder, self._context(self._method(section)))
        prompts = [[1], [(7 * i) % 128 for i in range(30)], [(7 * i) % 128 for i in range(33)]]
        engine = model_config(
            core_part("dovetail.testing.conformance.tiny:TinyModel"),
            config,
            folder,
            tiny.TinyModel.facts(config),
            quant=self.tested.selection,
        )
        for prompt, output in zip(prompts, generate(engine, prompts, max_tokens=8), strict=True):
            self.equal(output, dense.greedy(prompt, 8), f"greedy tokens after a prompt of {len(prompt)} tokens")

    @needs("experts")
    def test_experts(self, section: Section, tmp_path: Path) -> None:
        """quant.17: the experts of a sparse model, loaded from a checkpoint, give the exact mixture up to the format's
        error, also where some or all of them have no tokens.
        """
        experts, gate_up, down = self._mixture(section, tmp_path)
        x = _normal(6, 64, seed=9)
        ids = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [0, 2], [1, 0]])
        mix = torch.linspace(0.2, 0.8, 12).view(6, 2)
        expected = reference.moe_experts(x.double(), gate_up.double(), down.double(), ids, mix.double())
        for tokens in ([0, 1, 2, 3, 4, 5], [0, 3, 4], [2, 5], []):
            with torch.inference_mode():
                got = experts(x[tokens], ids[tokens], mix[tokens])
            what = f"mixture for {len(tokens)} tokens, which chose {ids[tokens].tolist()} of 3 experts"
            form = tuple(got.shape), got.dtype
            self.equal(form, ((len(tokens), 64), torch.float32), f"shape and dtype of the {what}")
            if tokens:
                self._accurate(got, expected[tokens], what, layers=3)

    # ---- helpers

    def _method(self, section: Section) -> QuantMethod:
        if section is None and self.manifest.checkpoint_methods and not self.manifest.on_load:
            self.lacks("on_load (and the test class sets no sections)")
        method: QuantMethod = self.tested.cls(None if section is None else copy.deepcopy(dict(section)))
        return method

    def _takes(self, section: Section, size: tuple[int, int]) -> bool:
        """Whether a layer of that size is taken; if not, hold the refusal to what it must say."""
        __tracebackhide__ = True
        try:
            self._method(section).tensors(*size, torch.float32)
        except ConfigError as error:
            odd = any(features % 32 for features in size)
            self.check(odd, f"a layer of {size}, both multiples of 32, is refused: {error}")
            named = any(str(features) in str(error) for features in size)
            self.check(named, f"the refusal of a layer of {size} names neither number: {error}")
            return False
        return True

    def _context(
        self, method: QuantMethod, dtype: torch.dtype = torch.float32, ops: OpTable | None = None
    ) -> ModelContext:
        return ModelContext(
            ops=ops or OpTable(), dtype=dtype, device=torch.device("cpu"), quant=method, max_model_len=96
        )

    def _stored(self, weight: Tensor, section: Section) -> Mapping[str, Tensor]:
        """The checkpoint's tensors for one layer."""
        if section is None:
            return {"weight": weight}
        stored = self.store(weight, section)
        if stored is None:
            self.lacks("store")
        assert stored is not None
        return stored

    def _layer(
        self,
        folder: Path,
        section: Section,
        weights: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        bias: Tensor | None = None,
        method: QuantMethod | None = None,
        ops: OpTable | None = None,
    ) -> Any:
        """A layer of these parts, loaded from a checkpoint; a function of the input."""
        context = self._context(method or self._method(section), dtype, ops)
        names = [SINGLE] if len(weights) == 1 else [MERGED.replace("qkv", part) for part in PARTS]
        sizes = [len(weight) for weight in weights]
        tensors: dict[str, Tensor] = {}
        for name, weight in zip(names, weights, strict=True):
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in self._stored(weight, section).items()}
        if bias is not None:
            parts = torch.split(bias, sizes)
            tensors |= {f"{name}.bias": part for name, part in zip(names, parts, strict=True)}
        probe: LinearProbe = load_probe(folder, context, tensors, weights[0].shape[1], sizes)
        return torch.inference_mode()(probe.logits)

    def _mixture(self, section: Section, folder: Path) -> tuple[Experts, Tensor, Tensor]:
        """Three loaded experts and their exact weights ``[E, O, I]``, of 64 hidden and 32 inner features.

        They differ in magnitude, but not in their share of the mixture, and the inputs of both products are ordinary.
        """
        method = self._method(section)
        stored_as = section if method.applies_to(EXPERTS) else None
        gates, ups = ([_normal(32, 64, seed=3 * e + i, scale=0.1 / 2**e) for e in range(3)] for i in range(2))
        downs = [_normal(64, 32, seed=3 * e + 2, scale=4.0**e) for e in range(3)]
        tensors = {
            f"{EXPERTS}.{e}.{part}_proj.{suffix}": tensor
            for part, weights in (("gate", gates), ("up", ups), ("down", downs))
            for e, weight in enumerate(weights)
            for suffix, tensor in self._stored(weight, stored_as).items()
        }
        experts = load_experts(folder, self._context(method), tensors, 3, (64, 32))
        return experts, torch.cat([torch.stack(gates), torch.stack(ups)], dim=1), torch.stack(downs)

    def _tiny_checkpoint(self, section: Section, folder: Path) -> tuple[dict[str, Any], Path]:
        """The tiny model's config and checkpoint, with the layers that the format applies to stored in it."""
        config = dict(tiny.WINDOWED)
        tensors = tiny.weights(config)
        if section is None:
            return config, write_checkpoint(folder / "tiny", config, tensors)
        method = self._method(section)
        plain = tiny.TinyModel(config, self._context(Unquantized()))
        blocks = dict(plain.named_modules())
        for tensor in declared(plain):
            name = tensor.name.removesuffix(".weight")
            if isinstance(blocks[tensor.block], Linear) and method.applies_to(tensor.block):
                stored = self._stored(tensors.pop(tensor.name), section)
                tensors |= {f"{name}.{suffix}": value for suffix, value in stored.items()}
        config["quantization_config"] = dict(section)
        return config, write_checkpoint(folder / "tiny", config, tensors)

    def _accurate(
        self, got: Tensor, exact: Tensor, what: str, dtype: torch.dtype = torch.float32, *, layers: int = 1
    ) -> None:
        """Require finite values, and the format's error plus the dtype's rounding."""
        __tracebackhide__ = True
        self.check(bool(got.isfinite().all()), f"{what}: {int((~got.isfinite()).sum())} values are not finite.")
        error = float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        bound = self.manifest.error if self.error is None else self.error
        allowed = layers * (bound + TOLERANCE[dtype])
        source = "the manifest's" if self.error is None else "the test class's"
        self.check(
            error <= allowed,
            f"{what}: the relative error is {error:.4g}, and {allowed:.4g} is allowed, by {source} error {bound:g}.",
        )

    def _accepts_or_names(self, section: dict[str, Any], field: str) -> None:
        __tracebackhide__ = True
        try:
            if self.tested.cls.recognises(section):
                self.tested.cls(section).tensors(128, 256, torch.float32)
        except ConfigError as error:
            self.check(field in str(error), f"{section!r}: the refusal does not name {field!r}: {error}")
        except Exception as error:  # noqa: BLE001  whatever else a plugin raises is what this looks for
            self.fail(f"{section!r}: expected a ConfigError naming {field!r}, got {type(error).__name__}: {error}")

    def _check_spec(self, suffix: str, spec: TensorSpec, out_features: int) -> None:
        what = f"{suffix!r} of a layer with {out_features} outputs"
        is_shape = all(isinstance(size, int) and size > 0 for size in spec.shape)
        self.check(is_shape, f"{what} has shape {spec.shape}, which is not positive.")
        self.check(isinstance(spec.dtype, torch.dtype), f"{what} has dtype {spec.dtype!r}.")
        if spec.output_dim is None:
            return
        in_range = 0 <= spec.output_dim < len(spec.shape)
        self.check(in_range, f"{what} has shape {spec.shape} and no dimension {spec.output_dim}.")
        numerator, denominator = spec.output_scale
        expected = -(-out_features * numerator // denominator)
        self.equal(spec.shape[spec.output_dim], expected, f"elements of {what} along its output dimension")


def _normal(rows: int, columns: int, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(50 + seed))
