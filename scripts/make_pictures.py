"""Draw docs/images from what the commands print: ``.venv/bin/python scripts/make_pictures.py``.

Nothing checks the pictures: what they show depends on the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images"
WIDTH = 100
MOST_LINES = 28
"""Longer output is shown without its middle."""
REFUSED = 2
PICTURES = {
    "plugins.svg": ["plugins"],
    "explain.svg": ["explain"],
    "refusal.svg": ["generate", "--prompt", "Hello", "--max-model-len", "8192", "--quantization", "int9"],
    "doctor.svg": ["doctor"],
    "conformance.svg": ["conformance", "specdec", "--name", "ngram"],
}


def main() -> None:
    """Draw every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, arguments in PICTURES.items():
        draw(FOLDER / name, arguments)
        sys.stdout.write(f"{FOLDER / name}\n")


def draw(file: Path, arguments: list[str]) -> None:
    """One terminal session as a picture."""
    command = [sys.executable, "-m", "dovetail", *arguments]
    settings = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=settings, text=True, check=False, **streams)
    if done.returncode not in (0, REFUSED):
        raise SystemExit(f"dovetail {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), f"dovetail {' '.join(arguments)}"))
    console.print(Text.from_ansi(shorten(done.stdout.replace(str(ROOT), "~/dovetail").replace(str(Path.home()), "~"))))
    console.save_svg(str(file), title="dovetail", clear=True)


def shorten(output: str) -> str:
    """At most ``MOST_LINES`` lines: the first and the last."""
    lines = output.rstrip().splitlines()
    if len(lines) <= MOST_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[: MOST_LINES - 6], "  ⋮", *lines[-5:]])


if __name__ == "__main__":
    main()
