"""Loading checkpoints: streaming, merging, tying, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, TensorSpec
from dovetail.errors import ModelLoadError
from dovetail.layers.embedding import Embedding
from dovetail.layers.head import Head
from dovetail.layers.linear import Linear, MergedLinear, Unquantized
from dovetail.layers.norm import RMSNorm
from dovetail.runner import loader, tensor_file
from dovetail.runner.loader import load_weights

TABLE = WeightTable(
    renames=(Rename("q", "qk", "q"), Rename("k", "qk", "k"), Rename("scale", "norm")),
    strip_prefixes=("wrapper",),
    ignore=("inv_freq",),
    tied={"head.weight": "embed.weight"},
)
V, D = 11, 6


class Tiny(Model):
    """An embedding, a merged projection with biases, a norm and a head that may be tied."""

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        self.embed = Embedding(context, V, D)
        self.qk = MergedLinear(context, "qk", D, {"q": 4, "k": 2}, bias=True)
        self.norm = RMSNorm(context, D, 1e-6)
        self.head = Head(context, "head", D, V, tied_to=self.embed if hf_config.get("tied") else None)

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        return ModelFacts(attention=(), vocab_size=V, max_positions=1, dtype=torch.float32)

    def weight_table(self) -> WeightTable:
        return TABLE

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        return self.norm.forward(self.embed.forward(token_ids_T))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        return self.head.forward(hidden_SD)


class WithScale(Unquantized):
    """Plain weights with a scale that all outputs share, and a packed tensor of four outputs per element."""

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        return {
            **super().tensors(in_features, out_features, dtype),
            "scale_all": TensorSpec(shape=(1,), dtype=dtype, output_dim=None),
            "codes": TensorSpec(
                shape=(3, out_features // 2), dtype=torch.int32, output_dim=1, output_scale=(1, 2), optional=True
            ),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        return dict(tensors)


def context(dtype: torch.dtype = torch.float32, **changes: Any) -> ModelContext:
    fields = {"ops": OpTable(), "dtype": dtype, "device": torch.device("cpu"), "quant": Unquantized()}
    return ModelContext(max_model_len=1, **(fields | changes))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "wrapper.embed.weight": (V, D),
        "q.weight": (4, D),
        "k.weight": (2, D),
        "q.bias": (4,),
        "k.bias": (2,),
        "scale.weight": (D,),
        "head.weight": (V, D),
        "rope.inv_freq": (3,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tiny(path: Path, stored: dict[str, Tensor], dtype: torch.dtype = torch.float32, **config: Any) -> Tiny:
    save_file(stored, path / "model.safetensors")
    model = Tiny(config, context(dtype))
    load_weights(model, path, Progress())
    return model


def failure(path: Path, stored: dict[str, Tensor]) -> str:
    with pytest.raises(ModelLoadError) as error:
        tiny(path, stored)
    return str(error.value)


@pytest.mark.parametrize("chunk_bytes", [1, 60, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_arrives(
    tmp_path: Path, dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed, merged in order, converted, whatever the size of the pieces."""
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk_bytes)
    stored = tensors()
    model = tiny(tmp_path, stored, dtype)
    x = torch.randn(5, D).to(dtype)
    merged = torch.cat([stored["q.weight"], stored["k.weight"]]).to(dtype)
    bias = torch.cat([stored["q.bias"], stored["k.bias"]]).to(dtype)
    assert torch.equal(model.qk.forward(x), nn.functional.linear(x, merged, bias))
    assert torch.equal(model.logits(x), nn.functional.linear(x, stored["head.weight"].to(dtype)))
    ids = torch.tensor([3, 0, 10])
    assert torch.equal(model.embed.forward(ids), stored["wrapper.embed.weight"].to(dtype)[ids])
    expected = OpTable().rms_norm(x, stored["scale.weight"].to(dtype), 1e-6)
    assert torch.equal(model.norm.forward(x), expected)
    assert torch.equal(model.norm.add(x, None)[0], expected)
    normed, total = model.norm.add(x, x)
    assert torch.equal(total, x + x)
    assert torch.equal(normed, OpTable().rms_norm(x + x, stored["scale.weight"].to(dtype), 1e-6))


def test_large_tensors_have_their_own_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAPPED_BYTES", 8)
    stored = tensors()
    model = tiny(tmp_path, stored, torch.bfloat16)
    x = torch.eye(D, dtype=torch.bfloat16)
    assert torch.equal(model.logits(x), stored["head.weight"].bfloat16().t())


def test_merged_already(tmp_path: Path) -> None:
    """A checkpoint may store the merged tensor under the model's own name."""
    stored = tensors()
    for suffix in ("weight", "bias"):
        stored[f"qk.{suffix}"] = torch.cat([stored.pop(f"q.{suffix}"), stored.pop(f"k.{suffix}")])
    model = tiny(tmp_path, stored)
    x = torch.randn(2, D)
    assert torch.equal(model.qk.forward(x), nn.functional.linear(x, stored["qk.weight"], stored["qk.bias"]))


def test_tied_head(tmp_path: Path) -> None:
    """Without a head of its own the model shares the table; with one it uses that."""
    stored = tensors()
    x = torch.randn(2, D)
    assert torch.equal(tiny(tmp_path, stored, tied=True).logits(x), x @ stored["head.weight"].t())
    stored.pop("head.weight")
    model = tiny(tmp_path, stored, tied=True)
    assert torch.equal(model.logits(x), x @ stored["wrapper.embed.weight"].t())
    assert model.head._packed.data_ptr() == model.embed._table_VD.data_ptr()


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("can_embed", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_large_tied_table_is_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool, can_embed: bool, has_head: bool
) -> None:
    """Packed alone, if it is large, if the platform can embed from that form, and if the head is no other matrix."""
    monkeypatch.setattr("dovetail.layers.head.LARGEST_COPY", V * D * 4 - large)
    changes: dict[str, Any] = {"linear_pack": lambda w: w.clone()}
    if can_embed:
        changes["embedding"] = lambda ids, table: table[ids]
    stored = tensors()
    if not has_head:
        stored["head.weight"] = stored["wrapper.embed.weight"]
    save_file({name: t for name, t in stored.items() if has_head or name != "head.weight"}, tmp_path / loader.SINGLE)
    model = Tiny({"tied": True}, context(ops=OpTable(**changes)))
    load_weights(model, tmp_path, Progress())
    assert (model.head._packed is model.embed._table_VD) == (large and can_embed and not has_head)
    assert torch.equal(model.logits(torch.eye(D)), stored["head.weight"].t())
    ids = torch.tensor([4, 9])
    assert torch.equal(model.embed.forward(ids), stored["wrapper.embed.weight"][ids])


class Recorded(Progress):
    """Every update."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int]] = []

    def update(self, stage: str, done: int, total: int) -> None:
        self.updates.append((stage, done, total))


def test_layers_are_packed_while_loading(tmp_path: Path) -> None:
    """Each as soon as its last tensor is there, large tensors first."""
    progress = Recorded()
    packed_at: list[int] = []

    def pack(weight_OI: Tensor) -> Tensor:
        packed_at.append(len(progress.updates))
        return weight_OI

    save_file(tensors(), tmp_path / "model.safetensors")
    load_weights(Tiny({}, context(ops=OpTable(linear_pack=pack))), tmp_path, progress)
    total = sum(tensor.numel() * 4 for name, tensor in tensors().items() if "inv_freq" not in name)
    stages, done, totals = zip(*progress.updates, strict=True)
    assert set(stages) == {"load"}
    assert set(totals) == {total}
    assert list(done) == sorted(set(done))
    assert done[-1] == total
    assert len(done) == 7
    # Largest layer first, then in file order: head, embed; k.bias, k.weight, q.bias, q.weight; scale.
    assert packed_at == [1, 6]


def test_sharded_folder(tmp_path: Path) -> None:
    stored = tensors()
    names = sorted(stored)
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: stored[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = Tiny({}, context())
    load_weights(model, tmp_path, Progress())
    assert torch.equal(model.logits(torch.eye(D)), stored["head.weight"].t())

    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"part-1\.safetensors is missing\. Download"):
        load_weights(Tiny({}, context()), tmp_path, Progress())
    for text in ("[]", "{", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelLoadError, match=r"index\.json is unreadable"):
            load_weights(Tiny({}, context()), tmp_path, Progress())


@pytest.mark.parametrize("name", ["../other.safetensors", "a/../../other.safetensors", "/other.safetensors"])
def test_index_that_names_files_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": name}}))
    with pytest.raises(ModelLoadError, match=r"outside of its folder: .*other"):
        load_weights(Tiny({}, context()), tmp_path, Progress())


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    stored = tensors()
    for name in ("k.weight", "q.bias", "scale.weight"):
        stored.pop(name)
    message = failure(tmp_path, stored)
    assert "3 missing" in message
    assert all(name in message for name in ("k.weight", "q.bias", "scale.weight", str(tmp_path)))
    assert "q.weight" not in message
    assert "config.json" in message


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    stored = tensors() | {f"extra.{i:02}.weight": torch.zeros(1) for i in range(13)}
    stored["embed.bias"] = torch.zeros(1)
    message = failure(tmp_path, stored)
    assert "14 unexpected: embed.bias (model.safetensors), extra.00.weight" in message
    assert "extra.08.weight (model.safetensors), and 4 more" in message
    assert "extra.09" not in message


def test_shape_names_both(tmp_path: Path) -> None:
    stored = tensors() | {"k.weight": torch.zeros(3, D), "scale.weight": torch.zeros(D, 1)}
    message = failure(tmp_path, stored)
    assert "k.weight (model.safetensors) has shape [3, 6], the model needs [2, 6]" in message
    assert "scale.weight (model.safetensors) has shape [6, 1], the model needs [6]" in message


def test_integers_do_not_become_weights(tmp_path: Path) -> None:
    message = failure(tmp_path, tensors() | {"scale.weight": torch.zeros(D, dtype=torch.int8)})
    assert "scale.weight (model.safetensors) is torch.int8, the model needs torch.float32" in message


def test_doubled_tensor(tmp_path: Path) -> None:
    """Two names for one place: a part beside the merged tensor, or two spellings."""
    message = failure(tmp_path, tensors() | {"qk.weight": torch.zeros(6, D)})
    assert "is there twice" in message
    message = failure(tmp_path, tensors() | {"embed.weight": torch.zeros(V, D)})
    assert "embed.weight (model.safetensors) is there twice" in message


def test_nothing_is_read_from_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    class Never(Progress):
        def update(self, stage: str, done: int, total: int) -> None:
            raise AssertionError

    stored = tensors()
    stored.pop("head.weight")
    stored.pop("k.bias")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="1 missing"):
        load_weights(Tiny({}, context()), tmp_path, Never())


def test_number_formats_bring_their_own_tensors(tmp_path: Path) -> None:
    """Shards along any dimension, elements of several outputs, and tensors that all parts share."""
    stored = tensors()
    for part, size in (("q", 4), ("k", 2)):
        stored[f"{part}.scale_all"] = torch.tensor([2.5])
        stored[f"{part}.codes"] = torch.arange(3 * size // 2, dtype=torch.int32).view(3, size // 2) + ord(part)
    save_file(stored, tmp_path / "model.safetensors")

    class Quantized(Tiny):
        def __init__(self) -> None:
            super().__init__({}, context())
            self.qk = MergedLinear(context(quant=WithScale()), "qk", D, {"q": 4, "k": 2}, bias=True)

    model = Quantized()
    load_weights(model, tmp_path, Progress())
    packed = model.qk._packed
    assert sorted(packed) == ["codes", "scale_all", "weight"]
    assert packed["scale_all"].tolist() == [2.5]
    assert torch.equal(packed["codes"], torch.cat([stored["q.codes"], stored["k.codes"]], dim=1))

    optional = {name: tensor for name, tensor in stored.items() if "codes" not in name}
    save_file(optional, tmp_path / "model.safetensors")
    load_weights(model := Quantized(), tmp_path, Progress())
    assert sorted(model.qk._packed) == ["scale_all", "weight"]

    stored["k.scale_all"] = torch.tensor([2.0])
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"_all .* differs from that of the other parts of qk"):
        load_weights(Quantized(), tmp_path, Progress())

    stored.pop("k.codes")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"1 missing: k\.codes"):
        load_weights(Quantized(), tmp_path, Progress())


class PerPart(Unquantized):
    """int8 weights with one scale per part of a merged layer, and one per three outputs of a part."""

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        return {
            "weight": TensorSpec(shape=(out_features, in_features), dtype=torch.int8),
            "scale": TensorSpec(shape=(out_features,), dtype=torch.float32, broadcast=True),
            "blocks": TensorSpec(shape=(out_features, 2), dtype=torch.float32, repeat=3),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        return dict(tensors)


class Parted(Tiny):
    """The merged projection alone is quantized."""

    def __init__(self) -> None:
        super().__init__({}, context())
        self.qk = MergedLinear(context(quant=PerPart()), "qk", D, {"q": 4, "k": 2})

    def weight_table(self) -> WeightTable:
        return replace(TABLE, renames=TABLE.renames[:2])


def parted() -> dict[str, Tensor]:
    stored = {name: tensor for name, tensor in tensors().items() if "bias" not in name}
    stored["norm.weight"] = stored.pop("scale.weight")
    for part, size in (("q", 4), ("k", 2)):
        stored[f"{part}.weight"] = torch.full((size, D), size, dtype=torch.int8)
        stored[f"{part}.blocks"] = torch.arange(2.0 * -(-size // 3)).view(-1, 2) + size
    return stored | {"q.scale": torch.tensor(0.5), "k.scale": torch.tensor([0.25])}


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_numbers_that_stand_for_many_outputs(tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number per part, stored as a scalar or a vector of one; and one per few outputs, never across two parts."""
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk_bytes)
    save_file(parted(), tmp_path / "model.safetensors")
    load_weights(model := Parted(), tmp_path, Progress())
    packed = model.qk._packed
    assert packed["scale"].tolist() == [0.5] * 4 + [0.25] * 2
    assert packed["blocks"].tolist() == [[4, 5]] * 3 + [[6, 7]] + [[2, 3]] * 2


def test_numbers_that_stand_for_many_outputs_in_a_merged_tensor(tmp_path: Path) -> None:
    stored = parted()
    stored["qk.weight"] = torch.cat([stored.pop("q.weight"), stored.pop("k.weight")])
    blocks = [stored.pop("q.blocks"), stored.pop("k.blocks")]
    stored["qk.blocks"] = blocks[0]
    stored.pop("q.scale")
    stored["qk.scale"] = stored.pop("k.scale")
    save_file(stored, tmp_path / "model.safetensors")
    load_weights(model := Parted(), tmp_path, Progress())
    assert model.qk._packed["scale"].tolist() == [0.25] * 6
    assert model.qk._packed["blocks"].tolist() == [[4, 5]] * 3 + [[6, 7]] * 3


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("q.scale", torch.zeros(4), r"q\.scale .* has shape \[4\], the model needs a single number"),
        ("k.scale", torch.zeros(1, 1), r"has shape \[1, 1\], the model needs a single number"),
        ("q.blocks", torch.zeros(1, 2), r"has shape \[1, 2\], the model needs \[2, 2\]"),
        ("q.weight", torch.zeros(4, D, dtype=torch.int16), "is torch.int16, the model needs torch.int8"),
        ("q.weight", torch.zeros(4, D, dtype=torch.uint8), "is torch.uint8, the model needs torch.int8"),
    ],
)
def test_quantized_tensors_that_do_not_fit(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    save_file(parted() | {name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load_weights(Parted(), tmp_path, Progress())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_coded_weights_are_no_plain_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    message = failure(tmp_path, tensors() | {"k.weight": torch.zeros(2, D).to(dtype)})
    assert f"k.weight (model.safetensors) is {dtype}, the model needs torch.float32" in message


def test_a_number_format_leaves_layers_out() -> None:
    class Picky(WithScale):
        def applies_to(self, layer: str) -> bool:
            return layer != "plain"

    assert set(Linear(context(quant=Picky()), "plain", 4, 4).specs) == {"weight"}
    assert set(Linear(context(quant=Picky()), "other", 4, 4).specs) == {"weight", "scale_all", "codes"}
    assert not Unquantized.recognises({"quant_method": "x"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.7.a.w1.weight", ("layers.7.a.weight", "")),
        ("x.experts.12.w1.weight", ("x.mlp.up.weight", "12.gate")),
        ("x.experts.12.w1.weight.scale", ("x.mlp.up.weight.scale", "12.gate")),
        ("x.experts.12.w10.weight", ("x.experts.12.w10.weight", "")),
        ("x.experts.1.2.w1.weight", ("x.experts.1.2.w1.weight", "")),
        ("x.my_experts.1.w1.weight", ("x.my_experts.1.w1.weight", "")),
        ("experts.0.w2.weight", ("down.weight", "0")),
        ("x.q.weight", ("x.qk.weight", "q")),
        ("x.q.experts.0.w2", ("x.q.down", "0")),
        ("old.gate.gate", ("new.gate.gate", "")),
        ("old.gateway.weight", ("old.gateway.weight", "")),
    ],
)
def test_renames_match_whole_parts_and_the_first_wins(name: str, expected: tuple[str, str]) -> None:
    table = WeightTable(
        renames=(
            Rename("a.w1", "a"),
            Rename("experts.*.w1", "mlp.up", "*.gate"),
            Rename("experts.*.w2", "down", "*"),
            Rename("q", "qk", "q"),
            Rename("old.gate", "new.gate"),
        )
    )
    target, shard = loader.map_name(name, table)
    assert (".".join(target), shard) == expected


def test_plain_parameters_are_refused(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    model = Tiny({}, context())
    model.conv = nn.Linear(2, 2)
    with pytest.raises(ModelLoadError, match=r"Tiny holds plain parameters \(conv\.weight, conv\.bias\)"):
        load_weights(model, tmp_path, Progress())


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="it holds: nothing"):
        load_weights(Tiny({}, context()), tmp_path, Progress())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"holds: pytorch_model\.bin.*convert other formats"):
        load_weights(Tiny({}, context()), tmp_path, Progress())


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (*range(20), len(whole) // 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"(truncated or corrupt|cannot be read): .*Download it again"):
            load_weights(Tiny({}, context()), tmp_path, Progress())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "offsets of x do not fit its shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "offsets of x do not fit its shape"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "offsets of x do not fit its shape"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "x has the unknown dtype 'F99'"),
        ({"dtype": "F32", "shape": [1]}, "header is unreadable"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "header is unreadable"),
        ([], "header is unreadable"),
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, "x should end at byte"),
    ],
)
def test_corrupt_header(tmp_path: Path, entry: Any, words: str) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelLoadError, match=words):
        load_weights(Tiny({}, context()), tmp_path, Progress())


def test_header_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]" + bytes(8))
    with pytest.raises(ModelLoadError, match="header is unreadable"):
        load_weights(Tiny({}, context()), tmp_path, Progress())


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.tensor(3.5), "b": torch.empty(0, 4), "c": torch.arange(3)}, tmp_path / "x.safetensors")
    file = tensor_file.TensorFile(tmp_path / "x.safetensors")
    found = {stored.name: [piece for _, piece in file.chunks(stored)] for stored in file.tensors}
    assert found["a"][0].shape == ()
    assert found["a"][0].item() == 3.5
    assert found["b"][0].shape == (0, 4)
    assert found["c"][0].tolist() == [0, 1, 2]
