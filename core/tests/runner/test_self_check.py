"""The self-check at load: honest parts pass, and each lie is caught, with words that help."""

import msgspec
import pytest
import torch

from dovetail.config import Selection
from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.errors import PluginLoadError
from dovetail.ops import reference
from dovetail.platforms.cpu.attention import CpuAttention
from dovetail.platforms.cpu.blocked_attention import BlockedAttention
from dovetail.platforms.cpu.platform import CpuPlatform
from dovetail.platforms.cpu.reference_attention import ReferenceAttention
from dovetail.plugins import builtin
from dovetail.runner.self_check import check_attention, checked_ops
from dovetail.runner.tiny_batch import TinyBatch
from dovetail.testing import engine_config
from dovetail.testing.platforms import LadderPlatform, ReferencePlatform

CPU = torch.device("cpu")
PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, scale=32**-0.5)
WINDOWED = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=32, scale=0.2, window=100)
CAPPED = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=32, scale=0.2, soft_cap=50.0)
CLAIMS = {"device_type": "cpu", "dtypes": ["float32"], "ops": []}
PART = Selection(name="beads", target="abacus:A", distribution="dist-abacus", version="3.1", why="", plugin="abacus")


def config(**changes):
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 128, "max_num_seqs": 8, "block_size": 16}
    return engine_config(**{**sizes, "attention": PART, "platform": PART, **changes})


def check(backend, *specs, platform=ReferencePlatform, **changes):
    settings = config(**changes)
    made = backend(
        ops=OpTable(),
        device=CPU,
        dtype=getattr(torch, settings.dtype),
        kv_dtype=getattr(torch, settings.kv_dtype),
        block_size=settings.block_size,
    )
    chip = platform(PlatformConfig())
    shapes = chip.shape_policy(settings.max_num_batched_tokens, settings.max_num_seqs)
    check_attention(settings, chip, shapes, made, specs or (PLAIN, WINDOWED, CAPPED))


@pytest.mark.parametrize("backend", [ReferenceAttention, BlockedAttention, CpuAttention])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_honest_backends_pass(backend, dtype, block_size):
    check(backend, dtype=dtype, kv_dtype=dtype, block_size=block_size)


def test_narrow_cache_passes():
    check(BlockedAttention, kv_dtype="float8_e4m3fn")


def in_127_steps(x_TNK):
    scale_TN1 = x_TNK.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
    return (x_TNK / scale_TN1).round() * scale_TN1


@pytest.mark.parametrize("stored", [in_127_steps, torch.round], ids=["scaled", "not scaled"])
def test_integers_in_the_cache_must_be_scaled(stored):
    class Integers(ReferenceAttention):
        def __init__(self, kv_dtype, **given):
            super().__init__(kv_dtype=torch.float32, **given)

        def forward(self, q, k, v, cache, metadata, spec):
            return super().forward(q, stored(k), stored(v), cache, metadata, spec)

    if stored is in_127_steps:
        check(Integers, kv_dtype="int8")
        return
    with pytest.raises(PluginLoadError, match=r"with a KV cache of int8, but its output .* is off by"):
        check(Integers, kv_dtype="int8")


def test_padded_shapes_pass():
    check(ReferenceAttention, platform=LadderPlatform)
    check(BlockedAttention, platform=LadderPlatform)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size"),
    [(1, 1, 1, 16), (1, 3, 5, 16), (2, 5, 40, 4), (1, 128, 20, 1), (3, 16, 600, 256)],
)
def test_any_limits_of_the_engine(max_num_seqs, max_num_batched_tokens, max_model_len, block_size):
    check(
        ReferenceAttention,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=block_size,
    )


def test_the_batch_keeps_to_the_limits_and_computes_every_token_once():
    batch = TinyBatch(
        block_size=16, max_requests=2, max_tokens=5, max_len=100, num_groups=1, device=CPU,
        dtype=torch.float32, kv_dtype=torch.float32,
    )  # fmt: skip
    done = {}
    for step in batch.steps():
        assert len(step.requests) <= 2
        assert step.num_tokens <= 5
        for request, before, count in zip(step.requests, step.done, step.counts, strict=True):
            assert before == done.get(request, 0)
            done[request] = before + count
    assert done == {0: 24, 1: 7, 2: 18, 3: 5}


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 128])
def test_any_page_size(block_size):
    check(ReferenceAttention, block_size=block_size)
    check(BlockedAttention, block_size=block_size)


def liar(**methods):
    return type("Liar", (ReferenceAttention,), methods)


def forward_with(change):
    """Attention of the reference, with other arguments or another result."""

    def forward(self, q, k, v, cache, metadata, spec):
        arguments = change(q, k, v, cache, metadata, spec)
        return ReferenceAttention.forward(self, *arguments)

    return forward


def replaced(**fields):
    from dataclasses import replace

    return forward_with(lambda q, k, v, cache, metadata, spec: (q, k, v, cache, metadata, replace(spec, **fields)))


def result(change):
    def forward(self, *arguments):
        return change(ReferenceAttention.forward(self, *arguments))

    return forward


def forgetful(self, q, k, v, cache, metadata, spec):
    """Sees only the keys of this step: right for whole prompts."""
    for tensor in cache:
        tensor.zero_()
    return ReferenceAttention.forward(self, q, k, v, cache, metadata, spec)


def one_query_per_request(self, q, k, v, cache, metadata, spec):
    """Right for decoding; every query of a request sees all of its tokens."""
    out = ReferenceAttention.forward(self, q, k, v, cache, metadata, spec)
    last = metadata.query_start_R1[1:].long() - 1
    counts = metadata.query_start_R1.diff()
    return out[last.repeat_interleave(counts)]


def prepared_with(change):
    """Prepares projections itself, from other arguments."""

    def forward_projected(self, qkv, positions, preparation, *layer):
        arguments = change(qkv, positions, preparation)
        return ReferenceAttention.forward_projected(self, *arguments, *layer)

    return forward_projected


def test_backends_that_prepare_projections_are_checked_both_ways():
    honest = liar(forward_projected=prepared_with(lambda *arguments: arguments))
    for dtype in ("float32", "bfloat16"):
        check(honest, dtype=dtype, kv_dtype=dtype)
    check(honest, platform=LadderPlatform)
    with pytest.raises(PluginLoadError, match="is off by"):
        check(type("Liar", (honest,), {"forward": replaced(scale=1.0)}), PLAIN)


LIES = {
    "turns nothing": (liar(forward_projected=prepared_with(lambda x, at, how: (x, 0 * at, how))), PLAIN, "is off by"),
    "no window": (liar(forward=replaced(window=None)), WINDOWED, "is off by"),
    "no soft cap": (liar(forward=replaced(soft_cap=None)), CAPPED, "is off by"),
    "wrong scale": (liar(forward=replaced(scale=1.0)), PLAIN, "is off by"),
    "forgetful": (liar(forward=forgetful), PLAIN, "for a later chunk of a prompt"),
    "not causal": (liar(forward=one_query_per_request), PLAIN, "is off by"),
    "not finite": (liar(forward=result(lambda out: out * float("nan"))), PLAIN, "its output is not finite"),
    "shape": (liar(forward=result(lambda out: out[:, :-1])), PLAIN, "instead of float32 [17, 128]"),
    "dtype": (liar(forward=result(lambda out: out.double())), PLAIN, "returns float64"),
    "page bytes": (liar(page_bytes=lambda self, spec: 4096), PLAIN, "claims 4096 bytes per page, and allocates 8192"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_backend_is_refused(lie):
    backend, spec, part = LIES[lie]
    with pytest.raises(PluginLoadError) as caught:
        check(backend, spec)
    message = str(caught.value)
    assert message.startswith("The self-check of 'beads' of plugin 'abacus' (dist-abacus 3.1) failed: it claims ")
    assert part in message
    assert message.endswith("Choose another --attention, and report this to the authors of dist-abacus.")


@pytest.mark.parametrize("lie", ["no window", "no soft cap", "forgetful", "not causal"])
def test_lies_show_in_narrow_dtypes_too(lie):
    backend, spec, _ = LIES[lie]
    with pytest.raises(PluginLoadError, match="is off by"):
        check(backend, spec, dtype="bfloat16", kv_dtype="bfloat16")


def test_caches_that_show_no_tensors_are_not_measured():
    class Sealed:
        def __init__(self, tensors):
            self.take = lambda: tensors

    class Opaque(ReferenceAttention):
        def allocate(self, spec, num_blocks):
            return Sealed(super().allocate(spec, num_blocks))

        def forward(self, q, k, v, cache, metadata, spec):
            return super().forward(q, k, v, cache.take(), metadata, spec)

    check(Opaque)


def test_views_of_one_memory_count_once():
    class Whole(ReferenceAttention):
        def allocate(self, spec, num_blocks):
            both = torch.zeros(2, num_blocks, self._block_size, spec.num_kv_heads, spec.head_size)
            return {"whole": both, "halves": (both[0], both[1])}

        def forward(self, q, k, v, cache, metadata, spec):
            return super().forward(q, k, v, cache["halves"], metadata, spec)

    check(Whole)


def overriding(**ops):
    return type("Platform", (ReferencePlatform,), {"ops": lambda self, dtype: ops})(PlatformConfig())


def check_overrides(claims=None, **ops):
    platform = overriding(**ops)
    part = msgspec.structs.replace(PART, claims={**CLAIMS, "ops": sorted(ops), **(claims or {})})
    checked_ops(part, platform, torch.float32)


HONEST = {name: getattr(reference, name) for name in ("rms_norm", "rotary", "silu_and_mul", "linear_pack", "linear")}


def test_honest_platform_passes():
    check_overrides(**HONEST)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_platform_keeps_what_its_manifest_says(dtype):
    manifests = []
    builtin.dovetail_register_platforms(lambda manifest, target: manifests.append(manifest))
    part = msgspec.structs.replace(PART, claims=msgspec.to_builtins(manifests[0]))
    platform = CpuPlatform(PlatformConfig())
    checked_ops(part, platform, getattr(torch, dtype))


@pytest.mark.parametrize(
    ("claims", "ops", "part"),
    [
        ({"device_type": "meta"}, {}, "it claims device type 'meta', and runs on cpu."),
        ({"ops": []}, {"linear": reference.linear}, "it overrides linear, which its manifest does not claim."),
        (
            {"ops": ["linear", "w4a16_mm"]},
            {"linear": reference.linear},
            "it claims w4a16_mm, and overrides them for none of its dtypes.",
        ),
        ({}, {"silu_and_mul": lambda x: x[..., :64]}, "for float32, but its result is off by"),
        ({}, {"silu_and_mul": lambda x: x}, "returns shapes [[5, 128]] instead of [[5, 64]]"),
        ({}, {"rms_norm": lambda x, w, eps: x * float("nan")}, "its result is off by nan"),
        ({}, {"linear": lambda x, w, bias: x @ w.T}, "claims operation 'linear'"),
    ],
)
def test_lying_platform_is_refused(claims, ops, part):
    with pytest.raises(PluginLoadError) as caught:
        check_overrides(claims, **ops)
    assert part in str(caught.value)
    assert "plugin 'abacus' (dist-abacus 3.1)" in str(caught.value)
    assert str(caught.value).endswith("Choose another --platform, and report this to the authors of dist-abacus.")


class Prepares(ReferencePlatform):
    """Lists what is launched to prepare, and what is launched for its results."""

    def __init__(self, config):
        self.launched, self.prepared = [], []

    def prepare(self, run):
        run()
        self.prepared, self.launched = self.launched, []

    def ops(self, dtype):
        return {name: self.listed(name, override) for name, override in HONEST.items()}

    def listed(self, name, override):
        return lambda *args: (self.launched.append(name), override(*args))[1]


def test_a_platform_prepares_for_all_operations_that_are_tried():
    platform = Prepares(PlatformConfig())
    checked_ops(msgspec.structs.replace(PART, claims={**CLAIMS, "ops": sorted(HONEST)}), platform, torch.float32)
    assert sorted(platform.launched) == sorted(HONEST)
    assert platform.prepared == platform.launched


def test_a_platform_prepares_for_every_kind_of_layer():
    class Listing(ReferenceAttention):
        def forward(self, q, k, v, cache, metadata, spec):
            chip.launched.append(spec)
            return super().forward(q, k, v, cache, metadata, spec)

    chip = Prepares(PlatformConfig())
    check(Listing, PLAIN, CAPPED, platform=lambda config: chip)
    assert len(set(chip.launched)) == 2
    assert chip.prepared == chip.launched


def test_a_machine_without_kernels_is_worth_a_line(caplog):
    part = msgspec.structs.replace(PART, claims={**CLAIMS, "ops": ["linear"]})
    checked_ops(part, overriding(), torch.float32)
    assert "overrides no operation on this machine; linear run on the reference" in caplog.text


def test_random_numbers_of_the_process_are_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    check(ReferenceAttention)
    check_overrides(**HONEST)
    assert torch.get_rng_state().equal(before)
