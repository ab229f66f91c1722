"""Kernels of dovetail-cuda against the device's own ceilings, measured in the same run.

    python benchmarks/gpu/kernels.py [PART OF A CASE'S NAME ...]

The floor of a case is the larger of its bytes over the copy bandwidth and its operations over the rate of a large
product. Each case runs in a graph over several sets of inputs, which together exceed the cache; medians.
"""

import sys
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from dovetail.contracts.attention import AttentionSpec, Preparation, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail_cuda.attention import TritonAttention
from dovetail_cuda.kernels.activation import silu_and_mul
from dovetail_cuda.kernels.experts import moe_experts
from dovetail_cuda.kernels.linear import linear
from dovetail_cuda.kernels.norm import add_rms_norm
from dovetail_cuda.kernels.projection import prepare_and_store
from dovetail_cuda.paged import PagedCache

DEVICE, DTYPE, PAGE = "cuda", torch.bfloat16, 16
HEADS, KV_HEADS, HEAD_SIZE, WIDTH = 32, 8, 128, 4096  # of an 8B model
EXPERTS, CHOICES, EXPERT_WIDTH, INNER = 128, 8, 2048, 768  # of a 30B mixture
PRODUCTS = (
    *((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)),  # of the 8B model
    *((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936)),  # of a 0.6B model
)
PRODUCT_TOKENS = (1, 4)
APART = 2**29
"""Bytes that a case's inputs have together, at least."""


def randn(*shape):
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def ceilings():
    x = torch.empty(2**31, dtype=torch.uint8, device=DEVICE).random_()
    y, a = torch.empty_like(x), randn(8192, 8192)
    copy = 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median") / 1e-3
    product = 2 * 8192**3 / do_bench(lambda: a @ a, return_mode="median") / 1e-3
    return copy, product


def seconds(calls):
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return do_bench(graph.replay, return_mode="median", rep=50) * 1e-3 / len(calls)


def copies(size):
    return range(max(1, min(16, -(-APART // size))))


def attention(requests, length, queries, shared=0, backend=TritonAttention):
    pages = -(-length // PAGE)
    table = (1 + torch.randperm(requests * pages, device=DEVICE)).int().view(requests, pages)
    table[:, : shared // PAGE] = table[0, : shared // PAGE].clone()
    q = randn(requests * queries, HEADS, HEAD_SIZE)
    size = 4 * (shared + requests * (length - shared)) * KV_HEADS * HEAD_SIZE
    caches = [PagedCache(*randn(2, requests * pages + 1, KV_HEADS, PAGE, HEAD_SIZE)) for _ in copies(size)]
    made = backend(ops=OpTable(), device=q.device, dtype=DTYPE, kv_dtype=DTYPE, block_size=PAGE)
    spec = AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, scale=HEAD_SIZE**-0.5)
    metadata = made.build_metadata(step(table, length, queries), 0)
    calls = [lambda c=c: made.attend(q, c, metadata, spec) for c in caches]
    dense = [randn(2, requests, KV_HEADS, length, HEAD_SIZE) for _ in caches]
    q_RHTK = q.view(requests, queries, HEADS, HEAD_SIZE).transpose(1, 2)
    causal = queries == length
    peer = [
        lambda kv=kv: F.scaled_dot_product_attention(q_RHTK, *kv, enable_gqa=True, is_causal=causal) for kv in dense
    ]
    visible = sum(length - queries + i + 1 for i in range(queries))
    comparable = causal or (queries == 1 and not shared)
    return size + 4 * q.numel(), 4 * HEADS * HEAD_SIZE * requests * visible, calls, peer if comparable else None


def cudnn_attention(*case):
    from dovetail_cuda.cudnn_attention import CudnnAttention  # its library may be absent

    return attention(*case, backend=CudnnAttention)


def step(table, length, queries):
    requests = len(table)
    tokens = torch.zeros(requests * queries, device=DEVICE, dtype=torch.int64)
    return StepTensors(
        token_ids_T=tokens,
        positions_T=tokens,
        query_start_R1=torch.arange(requests + 1, device=DEVICE, dtype=torch.int32) * queries,
        seq_lens_R=torch.full((requests,), length, device=DEVICE, dtype=torch.int32),
        block_tables=[table],
        slot_mapping=[tokens],
        logits_rows_S=tokens,
        max_query_len=queries,
        max_seq_len=length,
    )


def experts(tokens):
    weights = randn(EXPERTS, 2 * INNER, EXPERT_WIDTH), randn(EXPERTS, EXPERT_WIDTH, INNER)
    each = 3 * INNER * EXPERT_WIDTH * 2
    # few tokens choose others each time, whose weights are not in the cache
    ids = [
        torch.rand(tokens, EXPERTS, device=DEVICE).argsort(1)[:, :CHOICES].contiguous()
        for _ in copies(each * min(tokens * CHOICES, EXPERTS))
    ]
    x, factors = randn(tokens, EXPERT_WIDTH), torch.rand(tokens, CHOICES, device=DEVICE)
    size = each * sum(len(chosen.unique()) for chosen in ids) // len(ids)
    operations = tokens * CHOICES * 6 * INNER * EXPERT_WIDTH
    return size, operations, [lambda c=c: moe_experts(x, *weights, c, factors) for c in ids], None


def norm(tokens):
    size = 8 * tokens * WIDTH
    pairs = [(randn(tokens, WIDTH), randn(tokens, WIDTH)) for _ in copies(size)]
    weight = randn(WIDTH)
    return size, 0, [lambda p=p: add_rms_norm(*p, weight, 1e-5) for p in pairs], None


def projection(tokens):
    spec = AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, scale=HEAD_SIZE**-0.5)
    width = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    table, weights = torch.randn(4096, HEAD_SIZE, device=DEVICE), (1 + randn(HEAD_SIZE), 1 + randn(HEAD_SIZE))
    given = Preparation(cos_sin_PK=table, norm_weights_K=weights, eps=1e-6, ops=OpTable())
    size = 4 * tokens * width
    inputs = [randn(tokens, width) for _ in copies(size)]
    positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
    shape = (len(inputs), 2, tokens // PAGE + 1, KV_HEADS, PAGE, HEAD_SIZE)
    caches, slots = randn(*shape).transpose(3, 4), torch.randperm(tokens, device=DEVICE)
    calls = [
        lambda x=x, kv=kv: prepare_and_store(x, positions, given, spec, *kv, slots)
        for x, kv in zip(inputs, caches, strict=True)
    ]
    return size, 0, calls, None


def product(tokens, inputs, outputs):
    size = 2 * inputs * outputs
    x, weights = randn(tokens, inputs), [randn(outputs, inputs) for _ in copies(size)]
    calls, peer = [lambda w=w: linear(x, w) for w in weights], [lambda w=w: F.linear(x, w) for w in weights]
    return size, tokens * size, calls, peer


def gate(tokens):
    width = 14336
    size = 6 * tokens * width
    inputs = [randn(tokens, 2 * width) for _ in copies(size)]
    return size, 0, [lambda x=x: silu_and_mul(x) for x in inputs], None


ATTENTION = {
    "decode 64 × 640": (64, 640, 1),
    "decode 1 × 384": (1, 384, 1),
    "decode 256 × 1088": (256, 1088, 1),
    "decode 256 × 1088, 1024 shared": (256, 1088, 1, 1024),
    "decode 8 × 4096": (8, 4096, 1),
    "decode 1 × 32768": (1, 32768, 1),
    "3 drafts 64 × 640": (64, 640, 4),
    "prefill 1 × 2048": (1, 2048, 2048),
    "prefill 4 × 2048": (4, 2048, 2048),
    "prefill 16 × 512": (16, 512, 512),
    "prefill 64 × 64 after 1024 shared": (64, 1088, 64, 1024),
}
CASES = {
    **{f"attention, {name}": lambda case=case: attention(*case) for name, case in ATTENTION.items()},
    **{f"attention cudnn, {name}": lambda case=case: cudnn_attention(*case) for name, case in ATTENTION.items()},
    "experts, 1 token": lambda: experts(1),
    "experts, 64 tokens": lambda: experts(64),
    "experts, 512 tokens": lambda: experts(512),
    "experts, 8192 tokens": lambda: experts(8192),
    "add_rms_norm, 64 tokens": lambda: norm(64),
    "add_rms_norm, 8192 tokens": lambda: norm(8192),
    "norms of heads, rotation, KV write, 64 tokens": lambda: projection(64),
    "norms of heads, rotation, KV write, 8192 tokens": lambda: projection(8192),
    **{
        f"linear, {tokens} × {inputs} → {outputs}": lambda case=(tokens, inputs, outputs): product(*case)
        for tokens in PRODUCT_TOKENS
        for inputs, outputs in PRODUCTS
    },
    "silu_and_mul, 64 tokens": lambda: gate(64),
    "silu_and_mul, 8192 tokens": lambda: gate(8192),
}


def main(wanted):
    copy, product = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s, product {product / 1e12:.0f} TFLOP/s")
    print("| case | floor, µs | measured, µs | of the floor | torch, dense, µs |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        if name.startswith("attention cudnn") and find_spec("cudnn") is None:
            continue
        if wanted and not any(part in name for part in wanted):
            continue
        size, operations, calls, peer = case()
        floor, took = max(size / copy, operations / product), seconds(calls)
        other = f"{seconds(peer) * 1e6:.1f}" if peer else ""
        print(f"| {name} | {floor * 1e6:.1f} | {took * 1e6:.1f} | {floor / took:.0%} | {other} |")


if __name__ == "__main__":
    main(sys.argv[1:])
