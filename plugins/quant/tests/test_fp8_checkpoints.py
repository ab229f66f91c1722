"""Layers of fp8 checkpoints with known values, against float64 and against transformers' own dequantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.errors import ConfigError, ModelLoadError
from dovetail.platforms.cpu.platform import CpuPlatform
from dovetail.testing.conformance.linear_probe import MERGED, PARTS, SINGLE, load_probe
from dovetail_quant.fp8 import Fp8

FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
SHAPES = [(256, (128, 128, 256)), (200, (40, 24, 130)), (100, (130,)), (128, (7,))]
"""Inputs, and outputs of each part: whole blocks, and edges everywhere."""


def codes(outputs: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(outputs, inputs, generator=generator) * 60).to(FP8)


def scales(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) / 500 + 1e-4


def layer(folder, section, stored, inputs, *, dtype=torch.float32, native=True, bias=None):
    """The tensors of one part, or of three that are merged, as a function of the input."""
    ops = OpTable.resolve(CpuPlatform(PlatformConfig(num_threads=2)).ops(dtype) if native else {}, "cpu")
    context = ModelContext(ops=ops, dtype=dtype, device=torch.device("cpu"), quant=Fp8(section), max_model_len=1)
    names = [SINGLE] if len(stored) == 1 else [MERGED.replace("qkv", part) for part in PARTS]
    tensors = {f"{n}.{suffix}": t for n, part in zip(names, stored, strict=True) for suffix, t in part.items()}
    sizes = [len(part["weight"]) for part in stored]
    if bias is not None:
        tensors |= {f"{n}.bias": part for n, part in zip(names, bias.split(sizes), strict=True)}
    return torch.inference_mode()(load_probe(folder, context, tensors, inputs, sizes).logits)


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    """Activations as they are multiplied, in float64: rounded to fp8 after division by ``scale``, which broadcasts."""
    return (x.float() / scale).clamp(-448, 448).to(FP8).double() * scale.double()


def per_group(x: Tensor, size: int) -> Tensor:
    """Dynamic quantization: each row and group by its largest magnitude."""
    return torch.cat([quantized(g, g.float().abs().amax(1, keepdim=True) / 448) for g in x.split(size, dim=1)], dim=1)


def check(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-3}[actual.dtype]
    spread = expected.std().item()
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * spread)


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES, ids=str)
def test_blocks(tmp_path, inputs, outputs, dtype, native):
    stored = [
        {"weight": codes(o, inputs, i), "weight_scale_inv": scales(-(-o // 128), -(-inputs // 128), seed=i)}
        for i, o in enumerate(outputs)
    ]
    weight = torch.cat([_dequantize_fp8_weight(*part.values(), [128, 128], torch.float64) for part in stored])
    bias = torch.linspace(-1, 1, sum(outputs)).to(dtype)
    x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(5)).to(dtype)
    run = layer(tmp_path, BLOCKS, stored, inputs, dtype=dtype, native=native, bias=bias)
    check(run(x), per_group(x, 128) @ weight.t() + bias.double())


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES, ids=str)
def test_one_scale_per_tensor(tmp_path, inputs, outputs, native):
    """Of each part of a merged layer, whether a scalar or a vector of one."""
    stored = [
        {"weight": codes(o, inputs, i), "weight_scale": scales(*[1] * (i % 2), seed=i)} for i, o in enumerate(outputs)
    ]
    weight = torch.cat([part["weight"].double() * part["weight_scale"].double() for part in stored])
    x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(5))
    check(layer(tmp_path, PER_TENSOR, stored, inputs, native=native)(x), per_group(x, inputs) @ weight.t())


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize("input_scales", [(0.01, 0.01, 0.01), (0.01, 0.003, 0.003), (0.002, 0.01, 0.005)], ids=str)
def test_static_activations(tmp_path, input_scales, native):
    """Parts of a merged layer keep their own input scales; what exceeds the range is clamped."""
    inputs, outputs = 200, (40, 24, 130)
    stored = [
        {"weight": codes(o, inputs, i), "weight_scale": scales(seed=i), "input_scale": torch.tensor(input_scales[i])}
        for i, o in enumerate(outputs)
    ]
    x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(5))
    bias = torch.linspace(-1, 1, sum(outputs))
    parts = [
        quantized(x, part["input_scale"]) @ (part["weight"].double() * part["weight_scale"].double()).t()
        for part in stored
    ]
    assert 0.002 * 448 < x.abs().max() < 0.01 * 448
    run = layer(tmp_path, STATIC, stored, inputs, native=native, bias=bias)
    check(run(x), torch.cat(parts, dim=1) + bias.double())


def test_scales_as_transformers_names_them(tmp_path):
    inputs, outputs = 100, (40, 24, 130)
    stored = [
        {"weight": codes(o, inputs, i), "weight_scale": scales(seed=i), "input_scale": torch.tensor(0.01)}
        for i, o in enumerate(outputs)
    ]
    names = {"weight": "weight", "weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}
    spelt = [{names[suffix]: tensor for suffix, tensor in part.items()} for part in stored]
    x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(5))
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    expected = layer(tmp_path / "one", STATIC, stored, inputs)(x)
    assert torch.equal(layer(tmp_path / "other", STATIC, spelt, inputs)(x), expected)
    with pytest.raises(ModelLoadError, match="is there twice"):
        layer(tmp_path, STATIC, [{**a, **b} for a, b in zip(stored, spelt, strict=True)], inputs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_scheme", "per_row"),
        ("activation_scheme", "static"),
        ("fmt", "e5m2"),
        ("scale_fmt", "ue8m0"),
        ("expert_dtype", "fp4"),
        ("weight_block_size", [128]),
        ("weight_block_size", [128, 0]),
        ("weight_block_size", [128.0, 128]),
        ("weight_block_size", "128x128"),
        ("modules_to_not_convert", "lm_head"),
        ("ignored_layers", [3]),
        ("ignored_layers", ["("]),
        ("kv_cache_scheme", "static"),
    ],
)
def test_refusals_name_field_and_value(field, value):
    with pytest.raises(ConfigError) as refusal:
        Fp8(BLOCKS | {field: value})
    shown = value[0] if value == ["("] else value
    assert f"{field!r} in quantization_config of config.json is {shown!r}; it must be" in str(refusal.value)


def test_null_and_usual_values_are_welcome():
    usual = {"fmt": "e4m3", "scale_fmt": "float", "dequantize": False, "modules_to_convert": None, "new_field": None}
    assert Fp8(BLOCKS | usual).applies_to("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_listed_modules_stay_plain(field):
    listed = ["model.layers.1", "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.k_proj"]
    listed += ["model.layers.2.self_attn.v_proj", "layers.3.mlp.down_proj", r"model.layers.\d.mlp.experts"]
    method = Fp8(BLOCKS | {field: listed})
    plain = [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.2.self_attn.qkv_proj",
    ]
    plain += ["model.layers.3.mlp.down_proj", "model.layers.5.mlp.experts"]
    quantized = [
        "model.layers.10.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.4.self_attn.qkv_proj",
    ]
    assert [name for name in plain + quantized if not method.applies_to(name)] == plain


def test_half_of_a_merged_layer_cannot_stay_plain():
    method = Fp8(BLOCKS | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]})
    with pytest.raises(ConfigError, match=r"leaves model\.layers\.0\.mlp\.up_proj plain, but not the other parts"):
        method.applies_to("model.layers.0.mlp.gate_up_proj")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (BLOCKS, {"weight": torch.zeros(130, 100)}, "is torch.float32, the model needs torch.float8_e4m3fn"),
        (BLOCKS, {"weight": torch.zeros(130, 100).to(torch.float8_e5m2)}, "is torch.float8_e5m2, the model needs"),
        (BLOCKS, {"weight_scale_inv": torch.ones(1, 1)}, r"has shape \[1, 1\], the model needs \[2, 1\]"),
        (PER_TENSOR, {"weight_scale": torch.ones(130)}, "needs a single number"),
        (STATIC, {}, r"1 missing: layers\.0\.o_proj\.input_scale"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, section, changes, message):
    right = {"weight": codes(130, 100, 0)}
    right |= {"weight_scale_inv": torch.ones(2, 1)} if section is BLOCKS else {"weight_scale": torch.ones(())}
    with pytest.raises(ModelLoadError, match=message):
        layer(tmp_path, section, [right | changes], 100)
