"""Sampling kernels of dovetail-cuda against reading the logits once, and against the reference operations.

    python benchmarks/gpu/sampling.py

Kernels run in graphs over several sets of logits. The reference waits for the device where rows have filters, so its
calls are timed one by one. Logits are bfloat16: a wide normal distribution, with 40 likely tokens; flat ones are almost
equal, as those of random weights are.
"""

import torch
from kernels import DEVICE, DTYPE, ceilings, seconds
from triton.testing import do_bench

from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors
from dovetail_cuda.kernels.filtering import filter_logits
from dovetail_cuda.kernels.logprobs import top_logprobs
from dovetail_cuda.kernels.penalties import penalize
from dovetail_cuda.kernels.sampling import sample

VOCABULARIES = (128256, 151936)
ROWS = (1, 64, 512)
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.1": {"min_p": 0.1},
}


def random_logits(rows, size, spread):
    logits = spread * torch.randn(rows, size, device=DEVICE)
    logits[:, torch.randint(size, (40,), device=DEVICE)] += 5 * spread * torch.rand(rows, 40, device=DEVICE)
    return logits.to(DTYPE)


def parameters(rows, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0):
    return SamplingTensors(
        temperature_S=torch.full((rows,), temperature, device=DEVICE),
        top_k_S=torch.full((rows,), top_k, device=DEVICE),
        top_p_S=torch.full((rows,), top_p, device=DEVICE),
        min_p_S=torch.full((rows,), min_p, device=DEVICE),
        seeds_S=torch.arange(rows, device=DEVICE),
        positions_S=torch.arange(rows, device=DEVICE),
        all_greedy=temperature == 0,
        any_filter=temperature > 0 and (top_k > 0 or top_p < 1 or min_p > 0),
    )


def cases(rows, sets):
    """Name, the operation and the reference, each as a function of logits."""
    for name, settings in SETTINGS.items():
        given = parameters(rows, **settings)
        yield f"sample, {name}", lambda x, p=given: sample(x, p), lambda x, p=given: reference.sample(x, p)
    given = parameters(rows, top_k=50, top_p=0.9)
    yield "filter_logits", lambda x: filter_logits(x, given), lambda x: reference.filter_logits(x, given)
    tokens = sets[0].argmax(-1)
    for k in (0, 20):
        arguments = (tokens, k)
        yield (
            f"top_logprobs, {k} named",
            lambda x, a=arguments: top_logprobs(x, *a),
            lambda x, a=arguments: reference.top_logprobs(x, *a),
        )
    size, index, factors = sets[0].shape[1], torch.arange(rows, device=DEVICE), torch.rand(rows, 3, device=DEVICE)
    counts = (torch.rand(rows, size, device=DEVICE) < 0.003).to(torch.int32)
    in_prompt = torch.rand(rows, size, device=DEVICE) < 0.003
    wide, tables = sets[0].float(), (index, index, factors, counts, in_prompt)
    yield "penalize", lambda _: penalize(wide, *tables), lambda _: reference.penalize(wide, *tables)


def main():
    copy, _ = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s")
    print("| case | one read, µs | kernel, µs | reference, µs |\n|---|---|---|---|")
    for size in VOCABULARIES:
        for rows in ROWS:
            for kind, spread in (("", 2.5), (", flat", 0.01)):
                sets = [random_logits(rows, size, spread) for _ in range(3)]
                for name, operation, other in cases(rows, sets):
                    took = seconds([lambda x=x, operation=operation: operation(x) for x in sets])
                    slow = do_bench(lambda other=other, x=sets[0]: other(x), return_mode="median", rep=30) * 1e-3
                    floor = sets[0].numel() * sets[0].element_size() / copy
                    row = (f"{name}, {rows} × {size}{kind}", *(f"{1e6 * t:.1f}" for t in (floor, took, slow)))
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
