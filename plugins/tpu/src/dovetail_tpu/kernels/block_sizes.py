"""How steps are cut for attention: a function of what the chip has and what the step needs, not of trials on one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from dovetail.errors import ConfigError
from dovetail_tpu.kernels.chip import LANES, Chip, in_lanes
from dovetail_tpu.kernels.kv_write import cache_shape

VMEM_SHARE = 0.9375
"""Of vector memory, that the compiler may use."""
NAMED_SHARE = 0.6
"""Of vector memory, for what the kernel names. What values spill, up to half as much again, comes on top."""
SMEM_SHARE = 0.5
"""Of scalar memory, for block tables."""
LATENCY = 2e-6
"""Seconds until a copy from HBM has arrived, about. What is copied at a time should take as long to transfer."""
MOST_COPIED = 4096
"""Keys that are copied at a time."""
CHUNK = 256
"""Keys that are attended to at a time. Visible or not, they are computed on; fewer would not fill the matrix unit."""
MIXED_ROWS = 128
"""Rows of queries in mixed steps. A decode's visit computes on all of them, in about the time its pages take."""
MOST_ROWS = 512
SUBLANE_BYTES = 32
"""Height of a register: 8 rows of 4 bytes, 16 of 2."""


class Case(Enum):
    """What a step mostly holds. It changes speed alone: every cut is right for every step."""

    DECODE = "decode"
    """One token of each request."""
    MIXED = "mixed"
    """Decodes or drafts beside prompts."""
    PREFILL = "prefill"
    """Long prompts."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How attention is cut.

    Attributes:
        queries: tokens per block of queries.
        pages: that are copied at a time.
        chunk: pages that are attended to at a time; it divides ``pages``.
        vmem_bytes: that the compiler may use.
        cores: that share the blocks of queries.
    """

    queries: int
    pages: int
    chunk: int
    vmem_bytes: int
    cores: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """A step of one attention layer, on one device.

    Attributes:
        tokens, requests: of the bucket.
        columns: pages per request in the block table.
        page: tokens per page.
        heads, kv_heads, size: of the layer.
        itemsize, kv_itemsize: bytes of activations, and of what is stored.
    """

    tokens: int
    requests: int
    columns: int
    page: int
    heads: int
    kv_heads: int
    size: int
    itemsize: int = 2
    kv_itemsize: int = 2

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def fewest_queries(self) -> int:
        """Whose rows fill whole registers."""
        rows = SUBLANE_BYTES // self.itemsize
        return rows // math.gcd(rows, self.group)


def attention_blocks(chip: Chip, case: Case, shape: AttentionShape) -> Blocks:
    """What to cut a step into.

    Rows of queries: as few as fill registers for decodes; enough for prompts that arithmetic takes as long as copying
    their pages. Pages: as many at a time as arrive in the latency of a copy. Where these do not fit into vector
    memory, whichever takes more of it is halved.

    Raises:
        ConfigError: block tables, or the smallest cut, exceed the chip's memories.
    """
    _check_tables(chip, shape)
    pages = _pages(chip, shape)
    chunk = min(pages, max(1, CHUNK // _power_of_two(shape.page)))
    blocks = Blocks(_queries(chip, case, shape), pages, chunk, int(chip.vmem_bytes * VMEM_SHARE), chip.cores)
    while sum(attention_vmem(blocks, shape)) > chip.vmem_bytes * NAMED_SHARE:
        blocks = _smaller(blocks, chip, shape)
    return blocks


def attention_vmem(blocks: Blocks, shape: AttentionShape) -> tuple[int, int]:
    """Bytes of vector memory, about, that depend on the number of pages, and that depend on the number of queries."""
    padded, rows, keys = in_lanes(shape.size), blocks.queries * shape.group, _up(blocks.chunk * shape.page, LANES)
    place = _place_bytes(shape)
    buffer = 2 * blocks.pages * shape.page * place
    turned = keys * (place + 2 * padded * 4)  # a chunk by heads, and one head's keys and values in float32
    in_and_out = 4 * shape.kv_heads * rows * padded * shape.itemsize  # each is buffered twice
    softmax = shape.kv_heads * rows * (padded + 2 * LANES) * 4
    scores = 4 * rows * keys * 4  # scores, weights, their rounding, and what is seen
    return buffer + turned, in_and_out + softmax + scores


def _queries(chip: Chip, case: Case, shape: AttentionShape) -> int:
    fewest = shape.fewest_queries
    if case is Case.DECODE:
        return fewest
    # A row's arithmetic per key is 4 × size operations, what is copied per key 2 × size × itemsize bytes.
    rows = MIXED_ROWS if case is Case.MIXED else min(MOST_ROWS, _power_of_two(chip.ridge * shape.kv_itemsize / 2))
    most = min(rows // shape.group, _power_of_two(shape.tokens))
    return fewest * max(1, most // fewest)


def _pages(chip: Chip, shape: AttentionShape) -> int:
    keys = min(MOST_COPIED, max(CHUNK, chip.hbm_bandwidth * LATENCY / _place_bytes(shape)))
    return _power_of_two(min(keys / shape.page, shape.columns))


def _place_bytes(shape: AttentionShape) -> int:
    return math.prod(cache_shape(1, shape.kv_heads, shape.size, shape.kv_itemsize)) * shape.kv_itemsize


def _smaller(blocks: Blocks, chip: Chip, shape: AttentionShape) -> Blocks:
    of_pages, of_queries = attention_vmem(blocks, shape)
    has_more_queries = blocks.queries > shape.fewest_queries
    if blocks.pages > 1 and (of_pages > of_queries or not has_more_queries):
        return replace(blocks, pages=blocks.pages // 2, chunk=min(blocks.chunk, blocks.pages // 2))
    if has_more_queries:
        half = blocks.queries // 2 // shape.fewest_queries
        return replace(blocks, queries=max(1, half) * shape.fewest_queries)
    raise ConfigError(
        f"Attention with {shape.kv_heads} key/value heads of {shape.size} elements, {shape.group} query heads each, and"
        f" {shape.page} tokens per block takes {of_pages + of_queries} bytes of vector memory; {chip.name} has"
        f" {int(chip.vmem_bytes * NAMED_SHARE)} for it. Lower --block-size, or split heads among more chips."
    )


def _check_tables(chip: Chip, shape: AttentionShape) -> None:
    tables, room = shape.requests * shape.columns * 4, int(chip.smem_bytes * SMEM_SHARE)
    if tables > room:
        raise ConfigError(
            f"Block tables of {shape.requests} requests × {shape.columns} blocks take {tables} bytes of scalar memory;"
            f" {chip.name} has {room} for them. Raise --block-size, or lower --max-model-len or --max-num-seqs."
        )


def _power_of_two(number: float) -> int:
    """The smallest that is not less; 1 at least."""
    return 1 << max(0, math.ceil(math.log2(number)))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
