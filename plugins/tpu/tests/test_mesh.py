"""How models lie on meshes, and kernels on virtual devices of the host."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.layers.attention import SelfAttention
from dovetail.layers.linear import Unquantized
from dovetail.layers.mlp import GatedMLP
from dovetail.tensors import leaves
from dovetail_tpu.mesh import AXIS, kv_shape
from dovetail_tpu.placement import Placement, check_heads
from dovetail_tpu.quantized import block_scaled_pack, quantized_experts_pack, weight_only_pack

CONTEXT = ModelContext(
    ops=OpTable(), dtype=torch.float32, device=torch.device("meta"), quant=Unquantized(), max_model_len=8
)
ON_HEADS = """
import jax, jax.numpy as jnp, numpy as np, functools, sys
from jax.sharding import NamedSharding, PartitionSpec
from dovetail_tpu.kernels.gather_attention import gather_attention
from dovetail_tpu.kernels.kv_write import kv_scatter
from dovetail_tpu.mesh import HEADS, devices_of_step, kv_shape, over_heads, over_inner, tp_mesh, whole
from dovetail_tpu.placement import _order

kv_heads, heads, size, page = int(sys.argv[1]), 8, 64, 8
mesh = tp_mesh(jax.devices())

def attend(q_THK, k_TNK, v_TNK, kv_X2NK, slots_T, *tables):
    kv_X2NK = kv_scatter(kv_X2NK, k_TNK, v_TNK, slots_T)
    out = gather_attention(q_THK, kv_X2NK, *tables, kv_heads=k_TNK.shape[1], page=page, scale=0.1)
    return out, kv_X2NK

def step(*arrays):
    return over_heads(attend)(*arrays)[0]

def experts(x_TD, gate_up_EFD, down_EDF, ids_TA, weights_TA):
    gate, up = jnp.split(jnp.einsum("td,tfd->tf", x_TD, gate_up_EFD[ids_TA[:, 0]]), 2, axis=-1)
    return jnp.einsum("tf,tdf->td", jax.nn.silu(gate) * up * weights_TA, down_EDF[ids_TA[:, 0]])

draw = np.random.default_rng(0).standard_normal
q, k, v = (draw((16, n, size), dtype=np.float32) for n in (heads, kv_heads, kv_heads))
tables = np.arange(8, 24), np.array([[1, 2]]), np.array([0, 16]), np.array([16])
cache = lambda devices: jnp.zeros(kv_shape(devices, 4 * page, kv_heads, size, 4), jnp.float32)
pair = draw((16, 6), dtype=np.float32), draw((4, 16, 6), dtype=np.float32), draw((4, 6, 8), dtype=np.float32)
choice = np.arange(16)[:, None] % 4, draw((16, 1), dtype=np.float32)
square = draw((8, 128), dtype=np.float32)

assert devices_of_step() == 1
want = jax.jit(step)(q, k, v, cache(1), *tables), jax.jit(experts)(*pair, *choice), square @ square.T
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert devices_of_step() == len(jax.devices())
    spread = jax.device_put(cache(mesh.size), NamedSharding(mesh, HEADS))
    put = lambda arrays: [jax.device_put(x, NamedSharding(mesh, PartitionSpec())) for x in arrays]
    split = jax.jit(lambda *arrays: over_inner(experts)(*arrays)), jax.jit(lambda x: whole(lambda x: x @ x.T)(x))
    order = _order((8, 8), (mesh.size,) * 2, mesh.size).numpy()
    experts_pair = pair[0], pair[1][:, order], pair[2]
    got = (
        jax.jit(step)(*put([q, k, v]), spread, *put(tables)),
        split[0](*put([*experts_pair, *choice])),
        split[1](*put([square])),
    )
for a, b in zip(want, got):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
"""

PRODUCTS = """
import re
import sys

import torch
from dovetail.ops import reference
from dovetail.tensors import replaced
from dovetail_tpu import bridges, quantized
from dovetail_tpu.placement import Placement

bridge = bridges.open_bridge("jax")
devices, rows, inputs, outputs, group = bridge.num_devices, 5, 256, 48, 64
torch.manual_seed(0)
x, scale, grid = torch.randn(rows, inputs), torch.rand(outputs, 1), torch.rand(outputs, inputs // group)
codes = torch.randint(-127, 128, (outputs, inputs)).to(torch.int8)
pairs, zero = torch.randint(0, 256, (outputs, inputs // 2)).to(torch.uint8), torch.randint(0, 16, grid.shape).float()
starts = torch.tensor([0, 2, 5])

def dynamic(x, packed, ops, group=None):
    values, x_scale = reference.quantize_rows(x, torch.int8, group)
    if group is None:
        return ops.scaled_mm(values, packed[0], x_scale, packed[1], torch.float32)
    return ops.block_scaled_mm(values, packed, x_scale, torch.float32)

twice = [torch.stack([one, one.flip(0)]) for one in (pairs, grid, zero)]
products = {
    "one scale": (lambda ops: ops.weight_only_pack(codes, scale), lambda x, p, ops: ops.weight_only_mm(x, p)),
    "dynamic": (lambda ops: (codes, scale), dynamic),
    "in blocks": (lambda ops: ops.block_scaled_pack(codes, grid, group), lambda x, p, ops: dynamic(x, p, ops, group)),
    "pairs": (lambda ops: (pairs, grid, zero), lambda x, p, ops: ops.w4a16_mm(x, *p, group)),
    "experts": (
        lambda ops: ops.quantized_experts_pack(*twice, group),
        lambda x, p, ops: ops.quantized_experts_mm(x, p, starts),
    ),
}
for name in sys.argv[1:]:
    pack, product = products[name]
    want = product(x, pack(reference), reference)
    for layer, sums in ("gate_up_proj", 0), ("down_proj", 1):
        host = pack(quantized)
        layout = Placement(None, devices).of(f"{layer}._packed", host)
        packed = replaced(host, lambda tensor: bridge.adopt(*layout.of(tensor)))
        own = packed[0]._elem.addressable_shards[0].data.size
        assert own * devices == host[0].numel(), (name, layer)
        traced = bridge.trace(lambda words: [product(x + words[0], packed, quantized)], 1)
        executable = bridge.compile(traced)
        (got,) = bridge.to_host(bridge.call(executable, torch.zeros(1, dtype=torch.int32)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        text = executable.compiled.as_text()
        assert not re.findall("all-gather|all-to-all|collective-permute", text), (name, layer)
        assert text.count(" all-reduce(") == sums * (2 if name == "dynamic" else 1), (name, layer)
"""


def run_on(devices: int, script: str, *arguments: str) -> str:
    """Run a script in a process that sees so many devices of the host; its output."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("devices", "kv_heads"),
    [(2, 4), (4, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 8), (8, 1), (2, 1)))],
)
def test_kernels_on_several_devices_compute_what_one_does(devices, kv_heads):
    run_on(devices, ON_HEADS, str(kv_heads))


@pytest.mark.parametrize(
    ("devices", "products"),
    [
        (2, ["dynamic", "pairs"]),
        pytest.param(4, ["one scale", "dynamic", "in blocks", "pairs", "experts"], marks=pytest.mark.slow),
    ],
)
def test_devices_multiply_with_what_they_have_of_quantized_weights(devices, products):
    """They sum products over inputs, and agree on scales of rows, but send no weights to each other."""
    run_on(devices, PRODUCTS, *products)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("model.layers.3.self_attn.qkv_proj._packed", (768, 256), (AXIS, None)),
        ("model.layers.3.self_attn.o_proj._packed", (256, 512), (None, AXIS)),
        ("model.layers.3.mlp.gate_up_proj._packed.weight", (768, 256), (AXIS, None)),
        ("model.layers.3.mlp.down_proj._packed", (256, 512), (None, AXIS)),
        ("lm_head._packed", (512, 256), (AXIS, None)),
        ("model.embed_tokens._table_VD", (512, 256), (AXIS, None)),
        ("model.layers.3.mlp.experts.gate_up.stacked", (8, 768, 256), (None, AXIS, None)),
        ("model.layers.3.mlp.experts.down.stacked", (8, 256, 384), (None, None, AXIS)),
        ("model.layers.3.mlp.gate._weight", (8, 256), ()),
        ("model.norm.learned", (256,), ()),
        ("model.layers.3.self_attn.qkv_proj._bias_O", (768,), ()),
        ("lm_head._packed", (513, 256), ()),
    ],
)
def test_weights_are_split_by_the_role_of_their_layer(path, shape, spec):
    tensor = torch.empty(shape, device="meta")
    assert Placement(None, 4).of(path, tensor).of(tensor)[1] == spec
    assert Placement(None, 1).of(path, tensor).of(tensor)[1] == ()


def test_outputs_of_merged_layers_are_ordered_by_device():
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=2, scale=1.0)
    model = nn.Module()
    model.attn = SelfAttention(CONTEXT, "attn", 0, spec, 6, torch.empty(8, 2))
    model.mlp = GatedMLP(CONTEXT, "mlp", 6, 4)
    placement = Placement(model, 4)

    def laid(path, tensor):
        return placement.of(path, tensor).of(tensor)

    rows, spec = laid("attn.qkv_proj._packed", torch.arange(16)[:, None].expand(16, 6))
    by_device = [[0, 1, 8, 9, 12, 13], [2, 3, 8, 9, 12, 13], [4, 5, 10, 11, 14, 15], [6, 7, 10, 11, 14, 15]]
    assert rows[:, 0].view(4, 6).tolist() == by_device
    assert spec == (AXIS, None)
    assert laid("attn.qkv_proj._bias_O", torch.arange(16.0))[0].view(4, 6).tolist() == by_device
    rows, _ = laid("mlp.gate_up_proj._packed", torch.arange(8)[:, None].expand(8, 6))
    assert rows[:, 0].view(4, 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    unordered = torch.empty(6, 8)
    assert laid("attn.o_proj._packed", unordered)[0] is unordered
    with pytest.raises(ConfigError, match="4 inner features do not divide evenly among 3 devices"):
        Placement(model.mlp, 3)


def test_scales_lie_beside_the_weights_that_they_belong_to():
    weight, grid, outputs = torch.zeros(8, 12, dtype=torch.int8), torch.rand(8, 3), torch.rand(8, 1)
    tensors = {
        "one scale": (weight_only_pack(weight, outputs), [(AXIS, None), (None, AXIS)], [(None, AXIS), ()]),
        "groups": (block_scaled_pack(weight, grid, 4), [(AXIS, None), (None, AXIS)], [(None, AXIS), (AXIS, None)]),
        "experts": (
            quantized_experts_pack(weight[None].repeat(2, 1, 1), grid[None].repeat(2, 1, 1), None, 4),
            [(None, AXIS, None), (None, None, AXIS)],
            [(None, None, AXIS), (None, AXIS, None)],
        ),
        "of another format": (
            (weight, outputs, torch.rand(1, 1), torch.arange(12)),
            [(AXIS, None), (AXIS, None), (), ()],
            [(None, AXIS), (), (), ()],
        ),
        "pairs": ((weight, grid), [(AXIS, None), (AXIS, None)], [(None, AXIS), (None, AXIS)]),
    }
    for name, (packed, by_outputs, by_inputs) in tensors.items():
        for layer, devices, expected in (("gate_up_proj", 2, by_outputs), ("o_proj", 3, by_inputs)):
            layout = Placement(None, devices).of(f"layers.0.{layer}._packed", packed)
            held = [leaf for leaf in leaves(packed) if isinstance(leaf, torch.Tensor)]
            assert [layout.of(tensor)[1] for tensor in held] == expected, (name, layer)


def test_outputs_of_scales_are_ordered_with_those_of_weights():
    module = nn.Module()
    module.mlp = GatedMLP(CONTEXT, "mlp", 6, 4)
    rows = torch.arange(8.0)[:, None]
    packed = weight_only_pack(rows.expand(8, 8), rows.expand(8, 8), 1)  # as many groups as outputs
    layout = Placement(module, 2).of("mlp.gate_up_proj._packed", packed)
    assert layout.of(packed.codes)[0][:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert layout.of(packed.scale)[0][0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    with pytest.raises(ConfigError, match="a part of 4 of 8 outputs has scales of activations of its own"):
        layout.of(rows[:4])


def test_groups_of_inputs_are_not_cut():
    packed = block_scaled_pack(torch.zeros(8, 12, dtype=torch.int8), torch.rand(8, 3), 4)
    layout = Placement(None, 2).of("layers.0.down_proj._packed", packed)
    assert layout.of(packed.codes)[1] == (None, AXIS)
    with pytest.raises(ConfigError, match=r"3 inputs, or groups .* evenly among 2 devices.* make 1, 3 devices"):
        layout.of(packed.scale)


def test_a_cache_has_tiled_rows_on_every_device():
    assert kv_shape(1, 64, 8, 64, 2) == (64, 16, 128)
    assert kv_shape(4, 64, 8, 64, 2) == (64, 16, 128)
    assert kv_shape(8, 64, 2, 128, 2) == (64, 16, 128)  # two heads, each in four places
    assert kv_shape(2, 64, 6, 128, 2) == (64, 16, 128)  # three heads take eight rows


def test_heads_must_divide():
    spec = AttentionSpec(num_heads=12, num_kv_heads=4, head_size=64, scale=1.0)
    for devices in (1, 2, 4, 12):
        check_heads(devices, [spec])
    with pytest.raises(ConfigError, match=r"evenly among 8 devices. Take as many chips as make 1, 2, 4, 12 devices"):
        check_heads(8, [spec])
