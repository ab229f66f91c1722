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
PICTURES = {
    "plugins.svg": ["plugins"],
    "explain.svg": ["explain"],
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
    output = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), f"dovetail {' '.join(arguments)}"))
    console.print(Text.from_ansi(output.replace(str(ROOT), "~/dovetail").rstrip()))
    console.save_svg(str(file), title="dovetail", clear=True)


if __name__ == "__main__":
    main()
