"""Both attention kernels, on the host, against attention in float64 that knows no pages."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu.kernels.block_sizes import Blocks
from dovetail_tpu.kernels.gather_attention import gather_attention
from dovetail_tpu.kernels.kv_write import cache_shape
from dovetail_tpu.kernels.ragged_attention import _Shape, deal, plan_visits, ragged_attention

VMEM = 1 << 24
BLOCKS = Blocks(queries=8, pages=4, chunk=2, vmem_bytes=VMEM)
TOKENS, REQUESTS, PAGE, COLUMNS, PAGES = 40, 6, 8, 8, 64
STEPS = {  # of each request: tokens with this step, and how many of them are new
    "whole prompts": [(13, 13), (1, 1), (22, 22)],
    "prompt chunks": [(61, 17), (30, 9), (20, 8)],
    "decodes": [(64, 1), (1, 1), (8, 1), (9, 1), (33, 1), (17, 1)],
    "drafts": [(40, 5), (7, 5), (64, 5)],
    "a mix": [(33, 1), (0, 0), (50, 20), (16, 1), (0, 0), (29, 5)],
    "padding": [],
    "no padding": [(5, 1), (5, 5), (9, 1), (64, 31), (3, 1), (1, 1)],
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    heads: int
    kv_heads: int
    size: int
    dtype: str = "float32"
    kv_dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    blocks: Blocks = BLOCKS

    @property
    def options(self):
        return {
            "kv_heads": self.kv_heads,
            "page": PAGE,
            "scale": 0.3,
            "window": self.window,
            "soft_cap": self.soft_cap,
        }


LAYERS = {
    "one query head each": Layer(heads=3, kv_heads=3, size=64),
    "window": Layer(heads=4, kv_heads=2, size=96, window=5, blocks=Blocks(16, 2, 2, VMEM, cores=2)),
    "window and soft cap": Layer(heads=8, kv_heads=1, size=256, window=17, soft_cap=1.5, blocks=Blocks(4, 8, 2, VMEM)),
    "itself alone": Layer(heads=5, kv_heads=1, size=128, window=1, blocks=Blocks(8, 1, 1, VMEM, cores=2)),
    "bfloat16": Layer(heads=4, kv_heads=2, size=128, dtype="bfloat16", kv_dtype="bfloat16"),
    "fewer blocks than cores": Layer(
        heads=7, kv_heads=1, size=80, kv_dtype="bfloat16", blocks=Blocks(48, 8, 8, VMEM, cores=2)
    ),
    "stored as float8": Layer(heads=6, kv_heads=1, size=128, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    "stored as int8": Layer(heads=4, kv_heads=2, size=128, kv_dtype="int8", window=30, soft_cap=2.0),
    "stored as int8 for bfloat16": Layer(heads=2, kv_heads=1, size=64, dtype="bfloat16", kv_dtype="int8"),
}


class Step:
    """Random queries, and a cache in which each request's pages lie anywhere. What nobody may see is ``stale``."""

    def __init__(self, layer, sizes, seed=0, stale=np.nan):
        rng = np.random.default_rng(seed)
        self.layer, self.sizes = layer, sizes
        dtype, kv_dtype = jnp.dtype(layer.dtype), jnp.dtype(layer.kv_dtype)
        q_THK = rng.normal(size=(TOKENS, layer.heads, layer.size))
        q_THK[sum(new for _, new in sizes) :] = stale
        self.q_THK = q_THK.astype(dtype)
        shape = cache_shape(PAGES * PAGE, layer.kv_heads, layer.size, kv_dtype.itemsize)
        self.kv_X2NK = np.full(shape, 127 if kv_dtype == jnp.int8 else stale).astype(kv_dtype)
        self.table_RB = np.zeros((REQUESTS, COLUMNS), np.int32)
        self.keys, self.values = [], []
        free = list(1 + rng.permutation(PAGES - 1))
        for r, (length, _) in enumerate(sizes):
            (k_rows, k_LNK), (v_rows, v_LNK) = (self._stored(rng, length) for _ in "kv")
            self.keys.append(k_LNK)
            self.values.append(v_LNK)
            pages = [free.pop() for _ in range(-(-length // PAGE))]
            self.table_RB[r, : len(pages)] = pages
            for t in range(length):
                place = self.kv_X2NK[pages[t // PAGE] * PAGE + t % PAGE]
                place[...] = 0
                place[0 : 2 * layer.kv_heads : 2] = k_rows[t]
                place[1 : 2 * layer.kv_heads : 2] = v_rows[t]
        new = [new for _, new in sizes] + [0] * (REQUESTS - len(sizes))
        self.starts_R1 = np.cumsum([0, *new]).astype(np.int32)
        self.lengths_R = np.array([length for length, _ in sizes] + [0] * (REQUESTS - len(sizes)), np.int32)

    def _stored(self, rng, length):
        """Rows of the cache, and what they stand for. In int8, the lowest bits of a row's end are its scale's."""
        size, padded = self.layer.size, self.kv_X2NK.shape[2]
        shape = length, self.layer.kv_heads, padded
        if self.layer.kv_dtype == "int8":
            rows_LNK = rng.integers(-127, 128, shape).astype(np.int8)
            scale_LN1 = rng.uniform(0.005, 0.03, (*shape[:2], 1)).astype(jnp.bfloat16)
            bits_LNB = scale_LN1.view(np.uint16) >> np.arange(16, dtype=np.uint16) & 1
            rows_LNK[..., -16:] = rows_LNK[..., -16:] & -2 | bits_LNB.astype(np.int8)
            return rows_LNK, rows_LNK[..., :size] * scale_LN1.astype(np.float64)
        rows_LNK = np.zeros(shape, jnp.dtype(self.layer.kv_dtype))
        rows_LNK[..., :size] = rng.normal(size=(length, self.layer.kv_heads, size)).astype(rows_LNK.dtype)
        return rows_LNK, rows_LNK[..., :size].astype(np.float64)

    @property
    def arrays(self):
        return self.q_THK, self.kv_X2NK, self.table_RB, self.starts_R1, self.lengths_R

    @functools.cached_property
    def expected(self):
        """One query and head at a time, in float64, from keys and values in order."""
        layer = self.layer
        out_THK = np.zeros((TOKENS, layer.heads, layer.size))
        for r, (length, new) in enumerate(self.sizes):
            for i in range(new):
                position, token = length - new + i, self.starts_R1[r] + i
                first = 0 if layer.window is None else max(0, position - layer.window + 1)
                for h in range(layer.heads):
                    n = h // (layer.heads // layer.kv_heads)
                    scores_L = self.keys[r][first : position + 1, n] @ self.q_THK[token, h].astype(np.float64) * 0.3
                    if layer.soft_cap is not None:
                        scores_L = layer.soft_cap * np.tanh(scores_L / layer.soft_cap)
                    weights_L = np.exp(scores_L - scores_L.max())
                    out_THK[token, h] = weights_L / weights_L.sum() @ self.values[r][first : position + 1, n]
        return out_THK


@functools.cache
def step_of(layer, what):
    return Step(layer, STEPS[what], seed=len(what))


def assert_agrees(out_THK, step, what):
    out_THK = np.asarray(out_THK).astype(np.float64)
    tolerance = 2e-2 if step.layer.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(out_THK, step.expected, rtol=tolerance, atol=tolerance, err_msg=what)


@functools.cache
def ragged(layer, interpret=True):
    return jax.jit(functools.partial(ragged_attention, **layer.options, blocks=layer.blocks, interpret=interpret))


@functools.cache
def gather(layer):
    return jax.jit(functools.partial(gather_attention, **layer.options))


@pytest.mark.parametrize("kernel", [ragged, gather], ids=["ragged", "gather"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_agrees_with_dense_attention(layer, kernel):
    for what in STEPS:
        step = step_of(layer, what)
        assert_agrees(kernel(layer)(*step.arrays), step, what)


@pytest.mark.parametrize("kernel", [ragged, gather], ids=["ragged", "gather"])
@pytest.mark.parametrize("stale", [np.inf, -np.inf, 1e30])
def test_what_nobody_may_see_is_not_seen(kernel, stale):
    step = Step(LAYERS["window"], STEPS["a mix"], stale=stale)
    assert_agrees(kernel(step.layer)(*step.arrays), step, f"{stale}")


def test_wide_integers():
    layer = LAYERS["itself alone"]
    step = step_of(layer, "a mix")
    q_THK, kv_X2NK, *tables = step.arrays
    with jax.enable_x64(True):
        tables = [jnp.asarray(table, jnp.int64) for table in tables]
        for kernel in (ragged(layer), gather(layer)):
            assert_agrees(kernel(q_THK, kv_X2NK, *tables), step, "with int64 tables")


SHAPE = _Shape(queries=8, group=1, page=PAGE, pages=2, chunk=1, columns=COLUMNS, scale=1, window=None, soft_cap=None)
NUM_BLOCKS = TOKENS // SHAPE.queries


@jax.jit
def planned(starts_R1, lengths_R):
    visits = plan_visits(starts_R1, lengths_R, NUM_BLOCKS, SHAPE)
    return visits, deal(visits, NUM_BLOCKS, cores=2)


@pytest.mark.parametrize("what", STEPS)
def test_each_block_belongs_to_one_core_and_copies_to_both(what):
    step = step_of(LAYERS["one query head each"], what)
    visits, dealt = jax.tree.map(np.asarray, planned(step.starts_R1, step.lengths_R))
    first, second = ({*blocks_V.tolist()} for blocks_V in dealt.block)
    assert first
    assert second
    assert sorted([*first, *second]) == list(range(NUM_BLOCKS))
    for name in ("pages", "opens", "closes"):
        assert getattr(dealt, name).sum() == getattr(visits, name).sum()
    assert not dealt.pages[:, -1].any()
    steps_V, steps_CV = (-(-numbers.pages // SHAPE.pages) for numbers in (visits, dealt))
    assert abs(int(np.diff(steps_CV.sum(1))[0])) <= 2 * np.bincount(visits.block, steps_V).max()


def simulated(cores):
    """Memories of the chip: copies are done when awaited, what was not written holds NaN, and nothing lies outside."""
    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=cores
    )


@pytest.mark.parametrize(("kv_dtype", "cores"), [("float32", 1), ("int8", 2)])
def test_copies_do_not_race_and_leave_pages_before_the_window_alone(kv_dtype, cores):
    blocks = Blocks(16, 2, 1, VMEM, cores)
    layer = Layer(heads=4, kv_heads=2, size=128, kv_dtype=kv_dtype, window=20, blocks=blocks)
    step = Step(layer, STEPS["a mix"])
    left_out = 0
    for r, (length, new) in enumerate(step.sizes):
        first_page = max(0, length - new - layer.window + 1) // PAGE
        step.table_RB[r, :first_page] = 10**6
        left_out += first_page
    assert left_out
    assert_agrees(ragged(layer, simulated(cores))(*step.arrays), step, "simulated")
    assert not interpret_pallas_call.races.races_found
