"""The contracts: what a plugin implements. One file each, at most ten methods, dataclasses in and out.

Dimension letters in tensor names: T tokens of a step, R requests of a step, S rows that need logits, D model width,
H query heads, N key/value heads, K head size, F feed-forward width, V vocabulary, B blocks, P tokens per block,
O output features, I input features.
"""

API_VERSIONS = {
    "platform": 1,
    "ops": 1,
    "attention": 1,
    "model": 1,
    "quant": 1,
    "specdec": 1,
    "executor": 1,
    "command": 1,
}
"""The version of each contract that this core speaks."""


def accepted(contract: str) -> tuple[int, ...]:
    """The versions that a plugin may be written for: this core's, and the one before it if there was one."""
    version = API_VERSIONS[contract]
    return tuple(range(max(1, version - 1), version + 1))
