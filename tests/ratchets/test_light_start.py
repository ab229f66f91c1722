"""What a fresh interpreter has loaded after the light commands: counted in modules, not in seconds."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "jax",
    "torchax",
    "transformers",
    "numpy",
    "starlette",
    "huggingface_hub",
    "rich",
    "httpx",
    "pydantic",
    "yaml",
    "jinja2",
)


def loaded_after(statement):
    heavy = f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{statement}\n{heavy}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["chat", "--help"],
        ["bench", "--help"],
        ["bench", "serve", "--help"],
        ["doctor", "--help"],
        ["plan", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    assert loaded_after(f"from dovetail.cli.main import run\nassert run({arguments!r}) == 0") == []


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_after("import dovetail") == []


def test_discovery_of_all_installed_plugins_imports_nothing_heavy():
    assert loaded_after("from dovetail.plugins.host import PluginHost; PluginHost().discover()") == []


def test_the_checker_would_notice():
    assert loaded_after("import rich") == ["rich"]
