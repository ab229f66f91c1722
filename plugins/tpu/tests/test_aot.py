"""Whole steps, compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from dovetail.errors import ConfigError
from dovetail_tpu import hlo, table
from dovetail_tpu.aot import AotBridge, AotProgram
from dovetail_tpu.kernels import block_sizes
from dovetail_tpu.kernels.chip import CHIPS
from dovetail_tpu.slices import SLICES
from dovetail_tpu.table import CASES, DEMO, DEVICES, HEAD, LAYER, STEPS, Case
from dovetail_tpu.trial import Trial

PAGE = Path(__file__).parents[3] / "docs/reference/tpu-aot.md"
needs_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the chips' compiler, is not installed")


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_steps_compile_in_place_and_fit_and_the_page_says_so(case):
    programs = table.compiled(case)
    assert len(programs) == len(STEPS)
    for program in programs:
        layers = check(program, case)
        assert program.memory.alias == layers * 2 * math.prod(program.caches[0])
        # sums over devices: two a layer, the embedding, and the logit of a sampled token; logits are gathered
        exchanged = {} if case.devices == 1 else {"all-reduce": 2 + 2 * layers, "all-gather": 1}
        assert hlo.collectives(program.text) == exchanged
    own = [line for line in lines() if line[:3] == [case.chip, str(case.devices), case.model]]
    assert own == [list(row) for row in table.rows(case, programs)], "run make tpu-table"


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize(("devices", "step"), [*zip(DEVICES, STEPS, strict=True)])
def test_steps_with_rules_compile_in_place_and_fit(devices, step):
    case = Case("v5e", devices, DEMO)
    (program,) = table.compiled(case, [step], ruled=True)
    check(program, case)


def check(program: AotProgram, case: Case) -> int:
    """Caches are changed in place, and it all fits; the number of layers."""
    (shape,) = set(program.caches)
    assert hlo.orders(program.text, shape) == {"2,1,0"}
    assert hlo.copies(program.text, shape) == []
    assert not hlo.has_doubles(program.text)
    caches = len(program.caches) * 2 * math.prod(shape)
    assert program.memory.alias >= caches > program.memory.temp
    assert program.memory.total <= CHIPS[case.chip].hbm_bytes
    layers = table.configuration(case.model).hf_config["num_hidden_layers"]
    assert len(program.caches) == layers
    return layers


def lines() -> list[list[str]]:
    """Of the page's table."""
    text = PAGE.read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]


def test_page_has_a_row_for_every_step():
    head, _, *rows = lines()
    assert head == list(HEAD)
    assert [tuple(row[:4]) for row in rows] == [
        (case.chip, str(case.devices), case.model, step) for case in CASES for step in STEPS
    ]
    text = PAGE.read_text(encoding="utf-8")
    (libtpu,) = re.findall(r"libtpu ([\d.]+\d)", text)
    constraints = (PAGE.parents[2] / "constraints.txt").read_text(encoding="utf-8")
    assert f"libtpu=={libtpu}\n" in constraints
    assert text == table.text_of(rows, libtpu)


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
def test_a_step_that_is_too_large_is_refused_with_a_remedy():
    trial = Trial(table.configuration(LAYER), SLICES["v5e-1"])
    with pytest.raises(ConfigError, match=r"does not fit into the memory of v5e.*--max-num-batched-tokens.*more chips"):
        trial.compile([(512, 32)], blocks=1 << 17)


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
def test_a_kernel_that_is_too_large_is_refused_with_a_remedy(monkeypatch):
    """If kernels chose too large a cut."""
    monkeypatch.setattr(block_sizes, "NAMED_SHARE", 64.0)
    monkeypatch.setattr(block_sizes, "MOST_COPIED", 1 << 16)
    monkeypatch.setattr(block_sizes, "LATENCY", 1e-3)
    trial = Trial(table.configuration(LAYER), SLICES["v4-2"], 1)
    with pytest.raises(ConfigError, match=r"core's own memory \(vmem\) than v4 has. Lower --block-size"):
        trial.compile([(512, 32)], blocks=64)


def copied(x_ref, out_ref):
    out_ref[...] = x_ref[...]


def sorted_rows(x_ref, out_ref):
    out_ref[...] = jnp.sort(x_ref[...], axis=0)


def reordered(x_ref, out_ref):
    out_ref[...] = x_ref[...].reshape(4, 2, 128).transpose(2, 0, 1).reshape(8, 128)


@pytest.mark.slow
@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize(
    ("body", "block", "reason"),
    [
        (copied, (2, 32), "block shape"),  # refused as a ValueError
        (sorted_rows, (8, 128), "Unimplemented primitive"),  # as a NotImplementedError
        (reordered, (8, 128), "unsupported shape cast"),  # by Mosaic
    ],
)
def test_a_kernel_that_does_not_compile_is_its_authors_to_mend(body, block, reason):
    def kernel(x):
        spec = pl.BlockSpec(block, lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, out_shape=shape, grid=(8 // block[0],), in_specs=[spec], out_specs=spec)(x)

    bridge = AotBridge(SLICES["v5e-1"])
    traced = bridge.trace(lambda packed_W: bridge.apply(kernel, packed_W.view(8, 128)), 8 * 128)
    with pytest.raises(ConfigError, match=rf"A step does not compile for v5e: report it to the authors.*{reason}"):
        bridge.program(traced)


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("dovetail_tpu.topology.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dovetail-tpu\[aot\]'"):
        AotBridge(SLICES["v6e-4"])


def test_a_mesh_is_no_larger_than_the_slice():
    with pytest.raises(ConfigError, match="v6e-4 has 4 devices; a mesh of 5 does not fit on it"):
        AotBridge(SLICES["v6e-4"], 5)


TEXT = """HloModule step, entry_computation_layout={(bf16[64,4,128]{2,1,0:T(4)}, s32[8]{0})->(bf16[64,4,128]{0,1,2})}
ENTRY %main {
  %p = bf16[64,4,128]{2,1,0} parameter(0)
  %w = bf16[64,4,128]{2,1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %all-reduce.1 = f32[8,8]{1,0} all-reduce(%x), replica_groups={}
  %ag = (f32[8,8]{1,0}, f32[8,32]{1,0}) all-gather-start(%all-reduce.1)
"""


def test_text_of_a_program_is_understood():
    assert hlo.collectives(TEXT) == {"all-reduce": 1, "all-gather": 1}
    assert hlo.copies(TEXT, (64, 4, 128)) == []
    assert hlo.orders(TEXT, (64, 4, 128)) == {"2,1,0"}
    copied = TEXT + "  %c = bf16[64,4,128]{0,1,2} copy(%w)\n  %s = (bf16[64,4,128]{2,1,0}, u32[]) copy-start(%w)\n"
    assert hlo.copies(copied, (64, 4, 128)) == ["copy", "copy-start"]
    assert not hlo.has_doubles(TEXT)
    assert hlo.has_doubles(TEXT + "  %d = f64[8]{0} parameter(1)\n")
