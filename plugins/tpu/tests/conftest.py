"""Programs execute on the host, whatever the machine has."""

import os

import jax
import pytest

# threads of JAX's runtime for hosts: Pallas' simulator waits in one for others, for ever if a lone core brings but one
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))
jax.config.update("jax_platforms", "cpu")  # it has read its variable already
COMPILER = "libtpu, the chips' compiler, is not installed"


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def pytest_terminal_summary(terminalreporter):
    """What was not checked is told, however short the report."""
    skipped = [report for report in terminalreporter.getreports("skipped") if COMPILER in str(report.longrepr)]
    if skipped:
        terminalreporter.section("not compiled for TPUs", red=True)
        terminalreporter.line(f"{len(skipped)} tests were skipped: {COMPILER}. `make test-tpu-aot` installs it.")
