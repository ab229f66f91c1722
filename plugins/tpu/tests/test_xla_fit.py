"""What is said where torch_xla is missing, or lies beside a torch that it was not built for."""

import pytest

from dovetail.errors import ConfigError
from dovetail_tpu.bridges import open_bridge, xla_fit


@pytest.fixture
def install(monkeypatch):
    """Pretend that these versions are installed."""

    def pretend(**versions):
        monkeypatch.setattr(xla_fit.importlib.util, "find_spec", lambda name: versions.get(name))
        monkeypatch.setattr(xla_fit, "version", versions.__getitem__)

    return pretend


def test_versions_that_fit(install):
    install(torch="2.9.1+cu128", torch_xla="2.9.0", jax="0.10.2")
    xla_fit.check_fit()


def test_another_torch_is_named(install):
    install(torch="2.13.0+cpu", torch_xla="2.9.0", jax="0.10.2")
    with pytest.raises(ConfigError) as error:
        xla_fit.check_fit()
    assert "torch_xla 2.9.0 works with torch 2.9 alone; here is torch 2.13.0+cpu" in str(error.value)
    assert "pip install 'dovetail-tpu[torch-xla]'" in str(error.value)
    assert "--tpu-bridge jax" in str(error.value)


@pytest.mark.parametrize(("versions", "missing"), [({}, "torch_xla and jax"), ({"jax": "0.10.2"}, "torch_xla,")])
def test_what_is_missing_is_named(install, versions, missing):
    install(torch="2.9.0", **versions)
    with pytest.raises(ConfigError, match=f"needs {missing}"):
        open_bridge("torch_xla")
