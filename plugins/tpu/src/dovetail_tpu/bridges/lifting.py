"""Tracing a step over tensors that it holds anywhere: layers keep weights in plain attributes, and caches in handles.

A tensor of torchax is a wrapper around an array. Tracing puts tracers into the wrappers of all tensors that programs
may use, runs the step, and puts the arrays back. Which of them the step used, and which it changed, the trace tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from dovetail_tpu.bridges.protocol import Step
from dovetail_tpu.bridges.torchax_ops import TracingEnvironment, wrapped


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifted:
    """A step as a function of everything that it reads.

    Attributes:
        function: ``(constants, reads, changes, packed_W) -> (changes, results)``, of JAX arrays.
        constants: arrays that the step holds and that no tensor wraps.
        reads: tensors whose arrays it reads.
        changes: tensors whose arrays it replaces. They are to be donated.
        shapes: of the arrays in both, with shardings. Unlike these, they can be read while another step is traced.
        words: size of ``packed_W``, which is int32.
    """

    function: Callable[[Sequence[Array], Sequence[Array], Sequence[Array], Array], tuple[list[Array], list[Array]]]
    constants: Sequence[Array]
    reads: Sequence[Tensor]
    changes: Sequence[Tensor]
    shapes: tuple[list[Any], list[Any]]
    words: int

    def arrays(self) -> tuple[list[Array], list[Array]]:
        """What it reads, and what it changes, as it is now."""
        reads, changes = ([tensor._elem for tensor in group] for group in (self.reads, self.changes))  # type: ignore[attr-defined]
        return reads, changes


def lift(step: Step, words: int, tensors: Sequence[Tensor], env: TracingEnvironment) -> Lifted:
    """Trace a step.

    Args:
        step: the body; it must run on tensors of ``env``.
        words: size of its packed input.
        tensors: that it may use, wrappers of arrays or of ``jax.ShapeDtypeStruct``. Their order decides that of the
            program's inputs, and so whether another process finds the program in a cache.
        env: of torchax.
    """
    changed: list[int] = []

    def body(arrays: Sequence[Array], packed_W: Array) -> tuple[list[Array], list[Array]]:
        with _swapped(tensors, arrays), _tracing(env):
            results: list[Array] = env.t2j_iso([*step(wrapped(packed_W, env))])
            now = [tensor._elem for tensor in tensors]  # type: ignore[attr-defined]
        changed[:] = [i for i, (old, new) in enumerate(zip(arrays, now, strict=True)) if new is not old]
        return [now[i] for i in changed], results

    before = [tensor._elem for tensor in tensors]  # type: ignore[attr-defined]
    packed = jax.ShapeDtypeStruct((words,), jnp.int32)
    try:
        closed, shapes = jax.make_jaxpr(body, return_shape=True)(before, packed)
    finally:
        env.constants.clear()
    return _pruned(closed, jax.tree.structure(shapes), tensors, changed, [shape_of(array) for array in before])


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, and where it lies."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _pruned(
    closed: Any, results: Any, tensors: Sequence[Tensor], changed: Sequence[int], shapes: Sequence[Any]
) -> Lifted:
    """The traced program without the inputs that it does not use."""
    *inputs, packed = closed.jaxpr.invars
    used = {id(var) for eqn in closed.jaxpr.eqns for var in eqn.invars} | {id(var) for var in closed.jaxpr.outvars}
    read = [i for i, var in enumerate(inputs) if id(var) in used and i not in set(changed)]
    jaxpr = closed.jaxpr.replace(invars=[inputs[i] for i in (*read, *changed)] + [packed])

    def function(
        constants: Sequence[Array], reads: Sequence[Array], changes: Sequence[Array], packed_W: Array
    ) -> tuple[list[Array], list[Array]]:
        flat = jax.core.eval_jaxpr(jaxpr, constants, *reads, *changes, packed_W)
        outputs: tuple[list[Array], list[Array]] = jax.tree.unflatten(results, flat)
        return outputs

    return Lifted(
        function=function,
        constants=closed.consts,
        reads=[tensors[i] for i in read],
        changes=[tensors[i] for i in changed],
        shapes=([shapes[i] for i in read], [shapes[i] for i in changed]),
        words=packed.aval.size,
    )


@contextmanager
def _swapped(tensors: Sequence[Any], arrays: Sequence[Array]) -> Iterator[None]:
    """Other arrays in the wrappers, for a while."""
    before = [tensor._elem for tensor in tensors]
    try:
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor._elem = array
        yield
    finally:
        for tensor, array in zip(tensors, before, strict=True):
            tensor._elem = array


@contextmanager
def _tracing(env: TracingEnvironment) -> Iterator[None]:
    """Where torch code becomes JAX code. Inference mode would hand over operations that are not decomposed."""
    with torch.inference_mode(False), torch.no_grad(), env:
        yield
