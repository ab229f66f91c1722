"""Programs execute on the host, whatever the machine has."""

import pytest


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
