"""The device keeps its tensors apart from the host's."""

import pytest
import torch
from dovetail_abacus.device import AbacusTensor, install

DEVICE = install()


def test_tensors_live_there():
    tensor = torch.arange(6, device=DEVICE).view(2, 3)
    assert tensor.device.type == "abacus"
    assert isinstance(tensor, AbacusTensor)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.tensor([1, 2], device=DEVICE).tolist() == [1, 2]


def test_views_share_memory():
    tensor = torch.zeros(4, 4, device=DEVICE)
    tensor.t()[1, 2:] = torch.ones(2).to(DEVICE)
    assert tensor.cpu().nonzero().tolist() == [[2, 1], [3, 1]]
    assert tensor.t().stride() == (1, 4)


def test_copies_are_the_only_way_across():
    tensor, host = torch.ones(3, device=DEVICE), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"mixes tensors on abacus:0 and on cpu"):
        tensor + host
    with pytest.raises(RuntimeError):
        tensor.numpy()
    assert (tensor + host.to(DEVICE)).cpu().tolist() == [2, 2, 2]
    assert (tensor + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_inference_mode_reads_and_writes_tensors_from_outside():
    table = torch.zeros(2, 3, device=DEVICE)
    with torch.inference_mode():
        table[1, :2] = torch.tensor([1.0, 2.0], device=DEVICE)
        assert table.sum().item() == 3


def test_shapes_do_not_change_in_place():
    with pytest.raises(RuntimeError, match="changes a shape in place"):
        torch.zeros(1, 3, device=DEVICE).squeeze_(0)
