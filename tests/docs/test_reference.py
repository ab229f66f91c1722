"""What is written from the code is what the code would write."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE_DOCS = runpy.run_path(str(ROOT / "scripts/make_docs.py"))
PAGES = MAKE_DOCS["pages"]()
DRAWN = MAKE_DOCS["plugin_pages"]()


@pytest.mark.parametrize("name", PAGES)
def test_file_is_current(name):
    committed = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
    assert committed == PAGES[name], "run .venv/bin/python scripts/make_docs.py"


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.name)
def test_lifecycle_is_current(path):
    assert path.read_text(encoding="utf-8") == DRAWN[path], "run .venv/bin/python scripts/make_docs.py"


def test_nothing_else_is_there():
    compiled = {"tpu-aot.md"}  # written by a compiler that is not always there
    assert {path.name for path in (ROOT / "docs/reference").iterdir()} == set(PAGES) | compiled


def test_every_hook_and_field_has_text():
    cells = [line.strip("| ").split(" | ") for line in PAGES["hooks.md"].splitlines() if line.startswith("| `")]
    assert len(cells) > 40
    assert all(len(row[-1].strip()) > 3 for row in cells), [row for row in cells if len(row[-1].strip()) <= 3]


def test_every_registered_name_is_in_the_support_matrix():
    from dovetail.plugins.host import PluginHost

    registries = PluginHost(allow=("models", "quant", "specdec", "cuda", "tpu"), disable=()).discover().registries
    first_cells = re.findall(r"^\| `([^`]+)` \|", PAGES["support.md"], re.MULTILINE)
    names = {name for registry in registries.by_kind().values() for name in registry.names()}
    assert names == set(first_cells)
