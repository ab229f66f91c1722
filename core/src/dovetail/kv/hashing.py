"""Names of block content: a chain of hashes, each over its parent's and the tokens of one full block.

A name stands for the whole prefix up to the block's end. BLAKE2b with 256 bits: two prefixes never meet in
practice, and nobody can make them meet on purpose.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 32
_TOKEN_TYPE = "I"
_TOKEN_BYTES = array(_TOKEN_TYPE).itemsize


def root_hash(seed: int, salt: str | None = None) -> bytes:
    """The parent of a request's first block. Requests share blocks only under equal roots.

    Args:
        seed: of the engine.
        salt: keeps tenants apart; None is the common space.
    """
    marker = b"" if salt is None else b"salt:" + salt.encode("utf-8", "surrogatepass")
    return blake2b(b"dovetail:%d:" % seed + marker, digest_size=DIGEST_BYTES).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block of ``token_ids`` (each below 2³²) after ``parent``."""
    return blake2b(parent + array(_TOKEN_TYPE, token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def extend_chain(hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append the hashes of all full blocks of ``token_ids`` that are not in ``hashes`` yet."""
    begin, end = len(hashes) * block_size, len(token_ids) // block_size * block_size
    parent = hashes[-1] if hashes else root
    data, size = array(_TOKEN_TYPE, token_ids[begin:end]).tobytes(), block_size * _TOKEN_BYTES
    for at in range(0, len(data), size):
        parent = blake2b(parent + data[at : at + size], digest_size=DIGEST_BYTES).digest()
        hashes.append(parent)
