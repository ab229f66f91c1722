"""Tensors that are read ahead of their copies to a device, against what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dovetail.errors import ModelLoadError
from dovetail.runner import read_ahead, tensor_file
from dovetail.runner.read_ahead import ReadAhead
from dovetail.runner.tensor_file import TensorFile

HOST = torch.device("cpu")


def saved(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{index}": torch.randn((rows, columns), generator=generator).to(dtype)
        for index, (rows, columns, dtype) in enumerate(
            [(300, 7, torch.float32), (1, 2000, torch.bfloat16), (64, 64, torch.float16), (5, 1, torch.float32)] * 6
        )
    }
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.empty(0, 4)}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize(("chunk", "staging"), [(256, 1), (1000, 1 << 20), (1 << 20, 1 << 20)])
def test_every_byte_arrives_in_order(tmp_path: Path, chunk: int, staging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(read_ahead, "STAGING_BYTES", staging)
    tensors = [saved(tmp_path / name) for name in ("a", "b")]
    files = [TensorFile(tmp_path / name) for name in ("a", "b")]
    wanted = [(file, stored) for file in files for stored in file.tensors][::-1]
    with ReadAhead(wanted, HOST) as ahead:
        for file, stored in wanted:
            parts = list(ahead.chunks(file, stored))
            whole = parts[0][1] if not stored.shape else torch.cat([rows for _, rows in parts])
            assert torch.equal(whole, tensors[files.index(file)][stored.name])
            sizes = [len(rows) for _, rows in parts] if stored.shape else [0]
            assert [row for row, _ in parts] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_files_are_read_into_the_memory_that_the_platform_gives(tmp_path: Path) -> None:
    tensors, file, given = saved(tmp_path / "a"), TensorFile(tmp_path / "a"), []

    def staging(nbytes: int) -> torch.Tensor:
        given.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return given[-1]

    last = file.tensors[-1]
    with ReadAhead([(file, last)], HOST, staging) as ahead:
        [(_, piece)] = ahead.chunks(file, last)
    assert len(given) == 1
    assert torch.equal(piece.flatten(), given[0].view(last.dtype))
    assert torch.equal(piece, tensors[last.name])


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    file = TensorFile(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as short:
        short.truncate(file.tensors[-1].start)
    lost = file.tensors[-1]
    with ReadAhead([(file, lost)], HOST) as ahead, pytest.raises(ModelLoadError, match=r"a cannot be read: it ends"):
        list(ahead.chunks(file, lost))
