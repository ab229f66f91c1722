"""Compiles the kernels for prompts as a Hopper GPU would have them, without one."""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dovetail_cuda.kernels import many_rows, prompts
from dovetail_cuda.kernels.narrow import Codes


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

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **options: self.check(self.kernel.warmup(*args, grid=grid, **options))

    def check(self, kernel):
        assert kernel.metadata.shared <= 227 * 1024
        assert all(name in kernel.asm["ptx"] for name in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg"))
        sys.stdout.write("compiled\n")


driver.set_active(Hopper())
prompts._prompt_kernel = Compiled(prompts._prompt_kernel)
q, pages = torch.zeros(600, 8, 128, dtype=torch.bfloat16), torch.zeros(9, 2, 16, 128, dtype=torch.bfloat16)
table, tiles = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(5, prompts.COLUMNS, dtype=torch.int32)
prompts.attend_prompts(q, pages, pages, table, tiles, 0.1, 132)
many_rows._many_rows_kernel = Compiled(many_rows._many_rows_kernel)
x, scale = torch.zeros(300, 256, dtype=torch.bfloat16), torch.zeros(2, 384).t()
for weight in (torch.zeros(384, 128, dtype=torch.uint8), torch.zeros(384, 256, dtype=torch.float8_e4m3fn)):
    many_rows.many_rows_product(x, Codes(weight, scale, None, 128), None, 132, 256)
