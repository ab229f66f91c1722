"""Whether models fit on slices."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace

import msgspec
import pytest

from dovetail.cli.main import run
from dovetail.config import EngineConfig
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


def asking(config: EngineConfig, devices: object) -> EngineConfig:
    """The same over so many devices alone."""
    return msgspec.structs.replace(config, platform_options={**config.platform_options, "devices": devices})


def test_fewest_devices_that_fit_are_found(config, monkeypatch):
    looked_at = []

    def look(config, target, devices):
        looked_at.append(devices)
        return mesh(devices, fault="" if devices >= 4 else "too large")

    monkeypatch.setattr(plan, "_mesh", look)
    assert [found.devices for found in plan.plan(config, slice_of("v6e-8"))] == [1, 2, 4]
    assert [found.devices for found in plan.plan(asking(config, 8), slice_of("v6e-8"))] == [8]
    assert looked_at == [1, 2, 4, 8]


def test_no_more_than_one_device_is_looked_at_for_torch_xla(fitting, capsys):
    of_one = ["plan", "--tpu", "v5e-4", "--tpu-bridge", "torch_xla"]
    why = "The bridge torch_xla runs on one device; --tpu-bridge jax spreads a model over several."
    assert run(of_one) == 1
    assert capsys.readouterr().out.endswith(f"\n\n{why}\n\nIt does not fit: no\n")
    assert run([*of_one, "--json"]) == 1
    assert [part["devices"] for part in json.loads(capsys.readouterr().out)["meshes"]] == [1]
    assert run([*of_one, "--tpu-devices", "2"]) == 2
    assert capsys.readouterr().err == f"error: --tpu-devices is 2. {why}\n"


@pytest.mark.parametrize("devices", [0, 9, "many"])
def test_more_devices_than_there_are(config, devices):
    with pytest.raises(ConfigError, match=f"--tpu-devices is {devices}, and v6e-8 has 8; give a number from 1 to that"):
        plan.plan(asking(config, devices), slice_of("v6e-8"))


def test_what_is_not_counted_is_refused(config):
    draft = SimpleNamespace(name="a draft model")
    with pytest.raises(ConfigError, match="What a draft model takes is not counted: leave out --speculative-config"):
        plan.plan(msgspec.structs.replace(config, draft=draft), slice_of("v6e-8"))


def test_room_is_what_an_engine_takes(config):
    target = slice_of("v6e-8")
    whole = target.chip.hbm_bytes
    for changes, room in (
        ({}, int(0.9 * whole)),
        ({"memory_fraction": 0.5}, int(0.5 * whole)),
        ({"kv_cache_memory": GIB}, whole),
    ):
        assert plan._room(msgspec.structs.replace(config, **changes), target) == room


def test_report_says_what_is_missing_and_what_helps(config):
    fits = mesh(2, temp=GIB, code=0, tokens=4096)
    text = plan.report(config, slice_of("v5e-4"), [mesh(1, fault="4.00 GiB are missing: take more chips."), fits])
    assert "fable-4m on v5e-4: 4 × v5e, 4 devices of 15.75 GiB each, of which an engine takes 16.00 GiB" in text
    assert "steps of up to 512 tokens, bfloat16, weights none, cache bfloat16\n" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[4] == "1 12.00 GiB 8.00 GiB - 20.00 GiB 16.00 GiB"
    assert rows[5] == "2 6.00 GiB 4.00 GiB 1.00 GiB 11.00 GiB 16.00 GiB"
    assert "It fits over 2 of 4 devices, which have room for 4096 tokens of context." in text
    assert text.endswith("Run it with --tpu-devices 2.")
    text = plan.report(config, slice_of("v5e-4"), [mesh(1, fault="4.00 GiB are missing: take more chips.")])
    assert text.endswith("It does not fit: 4.00 GiB are missing: take more chips.")


@pytest.fixture
def fitting(monkeypatch):
    """Everything fits on two devices and more, and nobody needs a compiler to see it."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(plan, "NEEDS", ())
    monkeypatch.setattr(plan, "_mesh", lambda config, target, devices: mesh(devices, fault="" if devices > 1 else "no"))


def test_command_answers_with_its_status(fitting, capsys):
    assert run(["plan", "--tpu", "v5e-4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["slice"]) == ("fable-4m", "v5e-4")
    assert [(part["devices"], part["fits"], part["total"]) for part in found["meshes"]] == [
        (1, False, 20 * GIB),
        (2, True, 10 * GIB),
    ]
    assert run(["plan", "--tpu", "v5e-1"]) == 1
    assert "It does not fit: no" in capsys.readouterr().out
    assert run(["plan", "--tpu", "v5e-8", "--tpu-devices", "4", "--quantization", "int8"]) == 0
    shown = capsys.readouterr().out
    assert "weights int8" in shown
    assert "It fits over 4 of 8 devices" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tpu", "v6-8"], "error: There is no slice 'v6-8'. Did you mean 'v6e-8'?"),
        (["--tpu", "v6e-16"], "error: 'v6e-16' is not a slice of one host, and the platform runs on one."),
        (["--tpu", "v6e-8", "/no/such/folder"], "error: There is no folder /no/such/folder"),
        (["--tpu", "v6e-8", "--platform", "cpu"], "error: --platform is 'cpu', and --tpu asks about platform 'tpu'"),
        (["--tpu", "v6e-1", "--tpu-devices", "2"], "error: --tpu-devices is 2, and v6e-1 has 1;"),
    ],
)
def test_what_was_asked_wrongly_is_one_line(fitting, capsys, arguments, says):
    assert run(["plan", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(says)
    assert len(complaint.splitlines()) == 1


def test_slice_is_required(capsys):
    assert run(["plan"]) == 2
    assert "Missing option '--tpu'." in capsys.readouterr().err


def test_missing_compiler_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(plan, "NEEDS", ("torch", "no-such-compiler"))
    assert run(["plan", "--tpu", "v6e-8"]) == 2
    assert capsys.readouterr().err == (
        "error: Compiling for a chip that is not here requires no-such-compiler, which is not installed; run: "
        "pip install 'dovetail-tpu[jax,aot]'.\n"
    )


@pytest.mark.slow
@needs_compiler
def test_what_fits_is_what_the_compiler_says(config):
    (found,) = plan.plan(config, slice_of("v6e-4"))
    assert found.fits
    assert found.temp is not None
    assert found.weights > 9 * (1 << 20)  # of 5 million parameters in bfloat16
    assert found.cache == (32 * 2048 + 32) * 4 * 4 * 128 * 2  # contexts and the null block, 4 layers, 2 heads in lanes
    assert found.tokens is not None
    assert found.room == int(0.9 * slice_of("v6e-4").chip.hbm_bytes)
    free = found.room - found.total + found.cache
    assert abs(found.tokens - free / (4 * 4 * 128 * 2)) < 100


@pytest.mark.slow
@needs_compiler
def test_number_formats_are_counted(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setitem(table.LAYER_OF_8B, "vocab_size", 32768)

    def looked_at(**options: object) -> Mesh:
        (found,) = plan.plan(table.configuration(table.LAYER, **options), slice_of("v6e-1"))
        assert found.fits, found.fault
        return found

    plain, *narrow = looked_at(), looked_at(quantization="int8"), looked_at(quantization="fp8-w8a8")
    products = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)  # weights of a layer that become bytes; the tables do not
    for found in narrow:
        assert products < plain.weights - found.weights + 8 * (8 * 4096 + 2 * 14336) < 1.02 * products
        assert found.cache == plain.cache
    for dtype in ("float8_e4m3fn", "int8"):
        found = looked_at(kv_cache_dtype=dtype)
        assert found.weights == plain.weights
        assert 0.5 * plain.cache <= found.cache < 0.6 * plain.cache, dtype  # int8 has scales besides


@pytest.mark.slow
@needs_compiler
def test_weights_and_cache_that_do_not_fit_are_not_compiled(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setitem(table.LAYER_OF_8B, "num_hidden_layers", 24)
    (found,) = plan.plan(asking(table.configuration(table.LAYER), 1), slice_of("v5e-8"))
    assert found.temp is None
    assert "are missing: lower --max-num-seqs" in found.fault
    assert found.weights > 12.5e9  # two bytes for each of 6.3 billion
    assert found.cache == (32 * 2048 + 32) * 24 * 16 * 128 * 2


@pytest.mark.slow
@needs_compiler
def test_heads_that_do_not_divide_are_a_fault(config):
    (found,) = plan.plan(asking(config, 8), slice_of("v6e-8"))
    assert "4 query heads and 2 key/value heads do not divide evenly among 8 devices" in found.fault
