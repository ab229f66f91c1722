"""The examples on the pages pass the conformance suites, by the test files that the pages show."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("page", [pytest.param("model", marks=pytest.mark.slow), "quant", "specdec", "command"])
def test_example_conforms(installed, page):
    site = installed(f"docs/plugins/{page}.md").site
    (site / "pytest.ini").write_text("[pytest]\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py"],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
