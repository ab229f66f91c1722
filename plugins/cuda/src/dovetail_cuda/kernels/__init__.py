"""Kernels in Triton. One module per operation or family; each exports plain functions on tensors.

Dimension letters are those of :mod:`dovetail.contracts`. Nothing here waits for the device, and the grid of a launch
depends on the shapes of its arguments alone, so every function can be captured in a graph.
"""

from dovetail_cuda.kernels.names import know_the_compiler_by_its_files, name_helpers_first

name_helpers_first()
know_the_compiler_by_its_files()
