import sys

import pytest


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path for fake plugins; their modules are forgotten afterwards."""
    for variable in ("DOVETAIL_PLUGINS", "DOVETAIL_DISABLE_PLUGINS", "DOVETAIL_TRACE_HOOKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]
