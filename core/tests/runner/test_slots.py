"""Where the tensors of a step begin."""

from __future__ import annotations

import pytest
import torch

from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail.runner.rehearsal import largest_plan
from dovetail.runner.slots import ALIGNMENT, SlotTables, StepRows
from dovetail.testing import engine_config
from dovetail.testing.platforms import ReferencePlatform


@pytest.mark.parametrize("requests", [1, 3, 5, 8])
@pytest.mark.parametrize("static", [False, True])
def test_every_tensor_of_a_step_is_aligned(requests, static):
    config = engine_config(max_num_seqs=requests, max_num_batched_tokens=5 * requests)
    tables = SlotTables(requests, 64, 4, 2, ReferencePlatform(PlatformConfig()))
    plan = largest_plan(config, 2)
    tables.apply(plan)
    bucket = Bucket(5 * requests, requests)
    step = tables.step_tensors(StepRows.of(plan), bucket, requests if static else None)
    tensors = [step.token_ids_T, step.positions_T, step.query_start_R1, step.seq_lens_R, step.logits_rows_S]
    tensors += [*step.block_tables, *step.slot_mapping]
    assert [x.storage_offset() * x.element_size() % ALIGNMENT for x in tensors] == [0] * 9
    assert step.query_start_R1.tolist() == list(range(0, 5 * requests + 1, 5))
    assert torch.equal(step.positions_T, torch.arange(5).repeat(requests))
    assert step.logits_rows_S.tolist() == list(range(4, 5 * requests, 5))
