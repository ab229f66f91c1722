"""Steps as programs: what goes in and out, what is shared, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import Bucket
from dovetail.errors import ConfigError, PluginRunError
from dovetail_tpu import bridges
from dovetail_tpu.adopt import Adoption
from dovetail_tpu.packing import Packing
from dovetail_tpu.program import Program, Programs

BUCKET = Bucket(4, 2)


@dataclass(frozen=True, slots=True)
class Pair:
    first: Tensor
    second: Tensor | None
    flag: str = ""


@pytest.fixture
def programs():
    return Programs(bridges.open_bridge("jax"))


def step_tensors(tokens=4, max_seq_len=9):
    zeros = torch.zeros(tokens, dtype=torch.int64)
    starts, lengths = torch.tensor([0, 1, tokens], dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
    return StepTensors(
        token_ids_T=torch.arange(tokens),
        positions_T=zeros,  # one tensor in several places, as in steps of padding
        query_start_R1=starts,
        seq_lens_R=lengths,
        block_tables=[torch.ones(2, 3, dtype=torch.int32)],
        slot_mapping=[zeros],
        logits_rows_S=zeros,
        max_query_len=3,
        max_seq_len=max_seq_len,
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**31, -(2**31) - 1, 2**32 - 1]),
        torch.tensor([[1, -2], [2**31 - 1, -(2**31)]], dtype=torch.int32),
        torch.tensor([0.0, -0.0, 1e-42, torch.inf, -torch.inf, 3.14]),
        torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        torch.tensor([1.5, 65504], dtype=torch.float16),
        torch.tensor([True, False]),
        torch.tensor([255, 0], dtype=torch.uint8),
        torch.tensor(7),
        torch.empty(0, 3, dtype=torch.int64),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}",
)
def test_every_dtype_arrives_as_it_was(programs, tensor):
    other = torch.tensor([3.0])
    got, same = Program(lambda *given: given, BUCKET, programs)(tensor, other)
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(got, tensor)
    assert torch.equal(same, other)


def test_nan_arrives_as_it_was(programs):
    (got,) = Program(lambda x: (x,), BUCKET, programs)(torch.tensor([torch.nan, 1.0]))
    assert got.isnan().tolist() == [True, False]


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float64"):
        Packing.of([torch.zeros(1, dtype=torch.float64)])


def test_nothing_to_pack_is_a_word():
    assert Packing.of([]).pack([]).tolist() == [0]


def test_containers_come_back(programs):
    def swapped(pair: Pair) -> Pair:
        return Pair(pair.first + 1, None, pair.flag.upper())

    got = Program(swapped, BUCKET, programs)(Pair(torch.arange(3), None, "a"))
    assert (got.first.tolist(), got.second, got.flag) == ([1, 2, 3], None, "A")


def test_values_that_are_no_tensors_have_programs_of_their_own(programs):
    program = Program(lambda pair: (pair.first * len(pair.flag),), BUCKET, programs)
    for flag in ("ab", "c", "ab"):
        assert program(Pair(torch.ones(2), None, flag))[0].tolist() == [len(flag)] * 2
    programs.complete()
    assert programs.compiled == 2


def test_host_integers_of_a_step_are_not_part_of_the_program(programs):
    program = Program(lambda step: (step.token_ids_T + step.max_seq_len,), BUCKET, programs)
    for max_seq_len in (9, 10):
        assert program(step_tensors(max_seq_len=max_seq_len))[0].tolist() == [0, 1, 2, 3]
    assert programs.compiled == 1


def test_padding_is_compiled_and_gives_zeros(programs):
    program = Program(lambda step: (step.token_ids_T + 1, step.positions_T.float()), BUCKET, programs)
    ids, positions = program(step_tensors(max_seq_len=0))
    assert (ids.tolist(), ids.dtype, positions.dtype) == ([0, 0, 0, 0], torch.int64, torch.float32)
    programs.complete()
    assert programs.compiled == 1
    assert program(step_tensors())[0].tolist() == [1, 2, 3, 4]
    assert programs.compiled == 1


def test_waiting_tells_how_much_is_compiled(programs):
    told = []
    for factor in range(3):
        Program(lambda step, by=factor: (step.token_ids_T * by,), BUCKET, programs)(step_tensors(max_seq_len=0))
    programs.pool.wait(lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert programs.compiled == 3


def test_what_fails_to_compile_fails_the_end_of_warm_up(programs, monkeypatch):
    def refuse(traced):
        raise ValueError("no such layout")

    monkeypatch.setattr(programs.bridge, "compile", refuse)
    Program(lambda step: (step.token_ids_T,), BUCKET, programs)(step_tensors(max_seq_len=0))
    with pytest.raises(ConfigError, match="no such layout"):
        programs.complete()


def test_after_warm_up_a_step_of_other_shapes_is_an_error(programs):
    program = Program(lambda step: (step.token_ids_T,), BUCKET, programs)
    program(step_tensors())
    programs.complete()
    program(step_tensors())
    with pytest.raises(PluginRunError, match=r"after warm-up.*\[5\]"):
        program(step_tensors(tokens=5))


def test_a_step_that_is_first_met_while_serving_is_compiled_once(programs, caplog):
    programs.complete()
    program = Program(lambda step: (step.token_ids_T,), BUCKET, programs)
    program(step_tensors())
    program(step_tensors(max_seq_len=4))
    assert "Compiling a step" in caplog.text
    with pytest.raises(PluginRunError):
        program(step_tensors(tokens=5))


def test_states_are_changed_in_place_and_shared_among_programs(programs):
    bridge = programs.bridge
    state, unused = (bridge.allocate((3, 4), torch.float32) for _ in range(2))
    table = Adoption(bridge).of(Pair(torch.zeros(4), torch.arange(4.0)))

    def step(row: Tensor) -> tuple[Tensor]:
        state.tensor[row] = table.second
        table.first.add_(1)
        return (state.tensor.sum(0) + table.first,)

    one, other = Program(step, BUCKET, programs), Program(step, BUCKET, programs)
    assert one(torch.tensor(0))[0].tolist() == [1, 2, 3, 4]
    assert other(torch.tensor(2))[0].tolist() == [2, 4, 6, 8]
    (variant,) = one._variants.values()
    executable = variant._executable.result()
    changes = executable.lifted.changes
    assert [
        any(tensor is x for x in changes) for tensor in (state.tensor, table.first, table.second, unused.tensor)
    ] == [
        True,
        True,
        False,
        False,
    ]
    assert executable.alias_bytes == 3 * 4 * 4 + 4 * 4


def test_another_backend_is_refused(programs):
    with pytest.raises(ConfigError, match=r"--attention tpu.*Pair"):
        Program(lambda step, metadata: (step.token_ids_T,), BUCKET, programs)(
            step_tensors(), [Pair(torch.ones(1), None)]
        )


def test_tensors_of_the_host_in_a_step_are_its_constants(programs):
    held, scalar = torch.arange(4.0), torch.tensor(2.0)
    program = Program(lambda x: (held[x] * scalar, held[1:3]), BUCKET, programs)
    assert [out.tolist() for out in program(torch.tensor([3, 0]))] == [[6.0, 0.0], [1.0, 2.0]]
