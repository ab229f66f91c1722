"""The build backend: which compiler it takes, and that each finds its way to the same kernels."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

CORE = Path(__file__).parents[2]


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend, building one instruction set of copied sources."""
    spec = importlib.util.spec_from_file_location("backend", CORE / "_build" / "backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for source in module.SOURCES.glob("parallel.[ch]"):
        (tmp_path / source.name).write_text(source.read_text())
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    monkeypatch.setattr(module, "variants", lambda: {"plain": ("", ())})
    for kind in ("wheel", "editable"):
        monkeypatch.setattr(module.build_meta, f"get_requires_for_build_{kind}", lambda _: ["what setuptools needs"])
    monkeypatch.delenv("CC", raising=False)
    return module


def without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)


def check_library(folder: Path) -> None:
    library = ctypes.CDLL(str(folder / "kernels-plain.so"))
    assert library.dovetail_set_threads(1) == 1
    assert not list(folder.glob("*.new"))


def test_compiles_with_the_systems_compiler(backend: ModuleType, tmp_path: Path) -> None:
    if backend.system_compiler() is None:
        pytest.skip("needs a C compiler on this machine")
    assert backend.get_requires_for_build_editable() == ["what setuptools needs"]
    backend.compile_kernels()
    check_library(tmp_path)


def test_asks_for_a_compiler_where_there_is_none(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compilers(monkeypatch)
    needs = ["what setuptools needs", backend.COMPILER_FROM_PYPI]
    assert backend.get_requires_for_build_editable() == needs
    assert backend.get_requires_for_build_wheel() == needs


def test_a_compiler_that_does_not_work_is_passed_over(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(broken) if name == "cc" else None)
    assert backend.system_compiler() is None
    monkeypatch.setenv("CC", f"{sys.executable} -c pass")
    assert backend.system_compiler() == [sys.executable, "-c", "pass"]


def test_march_is_spelt_as_the_compiler_wants_it(backend: ModuleType) -> None:
    assert "-march=x86-64-v4" in backend.command(["gcc"], "x86-64-v4", ())
    assert "-march=x86_64_v4" in backend.command(["python", "-m", "ziglang", "cc"], "x86-64-v4", ())
    assert not any(flag.startswith("-march") for flag in backend.command(["gcc"], "", ()))


def test_a_failed_compilation_stops_the_installation_with_the_compilers_words(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "system_compiler", lambda: ["sh", "-c", "echo no such thing >&2; exit 3"])
    with pytest.raises(RuntimeError, match="no such thing"):
        backend.compile_kernels()


@pytest.mark.slow
def test_compiles_with_the_compiler_from_pypi(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs the ziglang package")
    without_compilers(monkeypatch)
    backend.compile_kernels()
    check_library(tmp_path)
    assert os.access(tmp_path / "kernels-plain.so", os.R_OK)
