"""The checkpoint: configuration, weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dovetail import checkpoint
from dovetail.cli.doctor.finding import Finding, ok, problem, warning, with_torch
from dovetail.cli.doctor.subject import Subject
from dovetail.sizes import size

AGAIN = "Download the checkpoint again."


def config(subject: Subject) -> Iterator[Finding]:
    """config.json can be read, and somebody serves what it describes."""
    if subject.registries is None:
        return
    if subject.folder is None:
        yield warning(f"{subject.engine.model} is not on this machine yet", "`dovetail serve` downloads it.")
        return
    described = checkpoint.read_config(subject.folder)
    checkpoint.eos_token_ids(subject.folder, described)
    named = checkpoint.architectures(described)
    served = {name for entry in subject.registries.models for name in entry.manifest.architectures}
    if set(named) & served:
        yield ok(f"{subject.folder}: {', '.join(named)}")
    else:
        yield problem(
            f"{subject.folder} is a {', '.join(named)}, which no installed plugin serves",
            "Install the distribution that brings the family; `dovetail plugins` lists what is installed.",
        )


@with_torch
def weights(subject: Subject) -> Iterator[Finding]:
    """Every file is there and whole, and holds what the index says."""
    if subject.folder is None or subject.engine.load_format == "dummy":
        return
    from dovetail.runner.loader import INDEX, weight_files
    from dovetail.runner.tensor_file import TensorFile

    held = {file: TensorFile(file).tensors for file in weight_files(subject.folder)}
    tensors = [tensor for file in held.values() for tensor in file]
    files = "1 file" if len(held) == 1 else f"{len(held)} files"
    yield ok(f"{len(tensors)} tensors in {files}, {size(sum(t.nbytes for t in tensors))}")
    index = subject.folder / INDEX
    if not index.exists():
        return
    names = {file.name: {tensor.name for tensor in stored} for file, stored in held.items()}
    lost = [name for name, file in _weight_map(index).items() if name not in names.get(file, ())]
    if lost:
        shown = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
        yield problem(f"{len(lost)} tensors of {INDEX} are not in their files: {shown}", AGAIN)


def _weight_map(index: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return found


def tokenizer(subject: Subject) -> Iterator[Finding]:
    """It can be read, has no more tokens than the model, and a chat template."""
    if subject.folder is None:
        return
    from dovetail.engine.tokenizer import Tokenizer

    other = subject.engine.tokenizer
    folder = subject.folder if other is None else checkpoint.locate_tokenizer(other)
    found = Tokenizer.from_folder(folder, subject.server.chat_template)
    described = checkpoint.read_config(subject.folder)
    rows = described.get("vocab_size") or (described.get("text_config") or {}).get("vocab_size")
    if isinstance(rows, int) and found.vocab_size > rows:
        yield problem(
            f"{found.vocab_size} tokens, and the model has {rows}",
            "Name the tokenizer that belongs to the model with --tokenizer.",
        )
    else:
        yield ok(f"{found.vocab_size} tokens")
    if not found.can_chat:
        yield warning("there is no chat template, so chat is refused", "Give one with --chat-template.")
