"""Compiles the kernels for prompts, and for dozens of tokens, as a Hopper GPU would have them, without one."""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dovetail_cuda import quantized
from dovetail_cuda.kernels import expert_groups, expert_order, expert_stream, many_rows, prompts, skinny
from dovetail_cuda.kernels.narrow import Codes
from dovetail_cuda.kernels.stream_support import Stream
from dovetail_cuda.narrow_ways import Way


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiled:
    """Stands in for a kernel, and only compiles it."""

    def __init__(self, kernel, *, is_shared_out=True):
        self.kernel = kernel
        self.names = ["wgmma.mma_async", "cp.async.bulk.tensor", *["setmaxnreg"] * is_shared_out]

    def __getitem__(self, grid):
        return lambda *args, **options: self.check(self.kernel.warmup(*args, grid=grid, **options))

    def check(self, kernel):
        assert kernel.metadata.shared <= 227 * 1024
        assert all(name in kernel.asm["ptx"] for name in self.names)
        sys.stdout.write("compiled\n")


driver.set_active(Hopper())
prompts._prompt_kernel = Compiled(prompts._prompt_kernel)
q, pages = torch.zeros(600, 8, 128, dtype=torch.bfloat16), torch.zeros(9, 2, 16, 128, dtype=torch.bfloat16)
table, tiles = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(5, prompts.COLUMNS, dtype=torch.int32)
prompts.attend_prompts(q, pages, pages, table, tiles, 0.1, 132)
many_rows._many_rows_kernel = Compiled(many_rows._many_rows_kernel)
x, scale = torch.zeros(300, 256, dtype=torch.bfloat16), torch.zeros(2, 384).t()
quantized.multiprocessors = lambda device: 132
for weight in (torch.zeros(384, 128, dtype=torch.uint8), torch.zeros(384, 256, dtype=torch.float8_e4m3fn)):
    quantized.way = lambda *product: Way.ROWS_256
    quantized._weight_only(x, Codes(weight, scale, None, 128), None)
skinny._skinny_kernel = Compiled(skinny._skinny_kernel, is_shared_out=False)
x, bias = torch.zeros(33, 256, dtype=torch.bfloat16), torch.zeros(70000, dtype=torch.bfloat16)
for outputs, gated in ((4096, False), (6144, False), (28672, True), (70000, False)):
    skinny.multiply(x, torch.zeros(outputs, 256, dtype=torch.bfloat16), bias, gated=gated)
expert_stream._inner_kernel = Compiled(expert_stream._inner_kernel, is_shared_out=False)
expert_stream._outer_kernel = Compiled(expert_stream._outer_kernel, is_shared_out=False)
x, gate_up, down = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((64, 512), (4, 768, 512), (4, 512, 384)))
order = expert_order.Order(torch.zeros(64, dtype=torch.int32), torch.zeros(3, 8, dtype=torch.int32))
for cut in (Stream(16, 3, 264, guesses=False), Stream(16, 3, 264, guesses=True), Stream(64, 2, 264, guesses=True)):
    hidden = expert_stream.inner_products(x, gate_up, order, cut)
    expert_stream.outer_products(hidden, down, torch.zeros(32, 2), order, cut)
expert_groups._outer_kernel = Compiled(expert_groups._outer_kernel)
expert_groups.multiprocessors = lambda device: 132
expert_groups.outer_products(hidden[:, :256].contiguous(), down[:, :, :256].contiguous(), torch.zeros(32, 2), order)
