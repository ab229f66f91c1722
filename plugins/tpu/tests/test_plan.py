"""Whether models fit on slices."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from dovetail.errors import ConfigError
from dovetail_tpu import plan, table
from dovetail_tpu.kernels.chip import CHIPS, GIB
from dovetail_tpu.plan import Mesh
from dovetail_tpu.slices import COUNTED, DEVICES, SLICES, slice_of

needs_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the chips' compiler, is not installed")


def test_every_generation_has_slices():
    assert {part.chip.name for part in SLICES.values()} == set(CHIPS) == set(COUNTED) == set(DEVICES)
    v6e, v4 = slice_of("v6e-8"), slice_of("V4-8")
    assert (v6e.chips, v6e.devices, v6e.topology) == (8, 8, "2x4")
    assert (v4.chips, v4.devices, v4.topology) == (4, 8, "2x2x1")
    assert slice_of("v5litepod-4") == slice_of("v5e-4")
    assert slice_of("v5p-8").devices == 4


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v6e-3", "'v6e-3' is not a slice of one host, and the platform runs on one. Take one of v4-2,"),
        ("v6e-256", "not a slice of one host"),
        ("v6-8", "There is no slice 'v6-8'. Did you mean 'v6e-8'"),
        ("v6e", "There is no slice 'v6e'"),
        ("h100-8", "There is no slice 'h100-8'"),
    ],
)
def test_unknown_slices_are_refused_with_those_there_are(name, says):
    with pytest.raises(ConfigError) as refusal:
        slice_of(name)
    assert says in str(refusal.value)
    assert "tpu7x-8." in str(refusal.value)


def mesh(devices: int, **changes: object) -> Mesh:
    sizes = {"weights": 12 * GIB // devices, "cache": 8 * GIB // devices, "room": 16 * GIB}
    return Mesh(devices=devices, **(sizes | changes))


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return table.configuration(table.DEMO)


def test_fewest_devices_that_fit_are_found(config, monkeypatch):
    looked_at = []

    def look(config, target, devices):
        looked_at.append(devices)
        return mesh(devices, fault="" if devices >= 4 else "too large")

    monkeypatch.setattr(plan, "_mesh", look)
    assert [found.devices for found in plan.plan(config, slice_of("v6e-8"))] == [1, 2, 4]
    assert [found.devices for found in plan.plan(config, slice_of("v6e-8"), 8)] == [8]
    assert looked_at == [1, 2, 4, 8]


def test_report_says_what_is_missing_and_what_helps(config):
    fits = mesh(2, temp=GIB, code=0, tokens=4096)
    text = plan.report(config, slice_of("v5e-4"), [mesh(1, fault="4.00 GiB are missing: take more chips."), fits])
    assert "fable-4m on v5e-4: 4 × v5e, 4 devices of 15.75 GiB each" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[4] == "1 12.00 GiB 8.00 GiB - 20.00 GiB 16.00 GiB"
    assert rows[5] == "2 6.00 GiB 4.00 GiB 1.00 GiB 11.00 GiB 16.00 GiB"
    assert "It fits over 2 of 4 devices, which have room for 4096 tokens of context." in text
    assert """--platform-config '{"devices": 2}'""" in text
    text = plan.report(config, slice_of("v5e-4"), [mesh(1, fault="4.00 GiB are missing: take more chips.")])
    assert text.endswith("It does not fit: 4.00 GiB are missing: take more chips.")


def test_program_answers_with_its_status(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(plan, "_mesh", lambda config, target, devices: mesh(devices, fault="" if devices > 1 else "no"))
    done = CliRunner().invoke(plan.command, ["--tpu", "v5e-4", "--json"], standalone_mode=False)
    assert done.return_value == 0, done.output
    found = json.loads(done.output)
    assert (found["model"], found["slice"]) == ("fable-4m", "v5e-4")
    assert [(part["devices"], part["fits"], part["total"]) for part in found["meshes"]] == [
        (1, False, 20 * GIB),
        (2, True, 10 * GIB),
    ]
    done = CliRunner().invoke(plan.command, ["--tpu", "v5e-1"], standalone_mode=False)
    assert (done.return_value, "It does not fit: no" in done.output) == (1, True)


def test_a_wrong_name_is_one_line():
    command = [sys.executable, "-m", "dovetail_tpu.plan", "--tpu", "v6-8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no slice 'v6-8'. Did you mean 'v6e-8'?")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@needs_compiler
def test_what_fits_is_what_the_compiler_says(config):
    (found,) = plan.plan(config, slice_of("v6e-4"))
    assert found.fits
    assert found.temp is not None
    assert found.weights > 9 * (1 << 20)  # of 5 million parameters in bfloat16
    assert found.cache == (32 * 2048 + 32) * 4 * 4 * 128 * 2  # contexts and the null block, 4 layers, 2 heads in lanes
    assert found.tokens is not None
    free = found.room - found.total + found.cache
    assert abs(found.tokens - free / (4 * 4 * 128 * 2)) < 100


@pytest.mark.slow
@needs_compiler
def test_weights_and_cache_that_do_not_fit_are_not_compiled(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setitem(table.LAYER_OF_8B, "num_hidden_layers", 24)
    (found,) = plan.plan(table.configuration(table.LAYER), slice_of("v5e-8"), 1)
    assert found.temp is None
    assert "are missing: lower --max-num-seqs" in found.fault
    assert found.weights > 12.5e9  # two bytes for each of 6.3 billion
    assert found.cache == (32 * 2048 + 32) * 24 * 16 * 128 * 2


@pytest.mark.slow
@needs_compiler
def test_heads_that_do_not_divide_are_a_fault(config):
    (found,) = plan.plan(config, slice_of("v6e-8"), 8)
    assert "4 query heads and 2 key/value heads do not divide evenly among 8 devices" in found.fault
