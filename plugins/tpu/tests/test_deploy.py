"""What is said of deployment agrees with the code."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from dovetail.cli.main import cli
from dovetail.options import ServerOptions
from dovetail.server.app import create_app
from dovetail_tpu.slices import SLICES

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy/tpu"
LABELS = {"v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "plugins/tpu/README.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "plugins/tpu/pyproject.toml").read_text())["project"]["optional-dependencies"]


def manifest(chip):
    """By kind."""
    parts = list(yaml.safe_load_all((FOLDER / f"gke-{chip}.yaml").read_text(encoding="utf-8")))
    assert len({part["kind"] for part in parts}) == len(parts)
    return {part["kind"]: part for part in parts}


def commands_of_the_folder():
    """Arguments of every `dovetail` in the manifests, the Dockerfile and the page."""
    for chip in LABELS:
        yield manifest(chip)["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    yield from (json.loads(found) for found in re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE))
    for line in README.replace("\\\n", " ").splitlines():
        if line.startswith("    dovetail "):
            yield shlex.split(line)[1:]
        elif line.startswith("    docker run "):
            words = shlex.split(line)
            yield words[words.index("serve") :]


@pytest.mark.parametrize("chip", LABELS)
def test_manifests_ask_for_whole_slices(chip):
    deployment, claim, service = (
        manifest(chip)[kind] for kind in ("Deployment", "PersistentVolumeClaim", "Service")
    )
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    selector = pod["nodeSelector"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = selector["cloud.google.com/gke-tpu-topology"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == LABELS[chip]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert [part.chips for part in SLICES.values() if (part.chip.name, part.topology) == (chip, topology)][-1] == chips
    assert f"| `{LABELS[chip]}` | {topology} | {chips} |" in README
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("chip", LABELS)
def test_manifests_ask_the_server_that_they_start(chip):
    deployment, claim, service = (
        manifest(chip)[kind] for kind in ("Deployment", "PersistentVolumeClaim", "Service")
    )
    spec = deployment["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    routes = {route.path for route in server_routes()}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["containerPort"]}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/health", "readiness": "/health", "liveness": "/version"
    }  # fmt: skip
    assert {probe["httpGet"]["path"] for probe in probes.values()} <= routes
    assert service["spec"]["ports"][0]["targetPort"] == port["containerPort"] == ServerOptions().port
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] == 3600  # an hour, says README.md
    stops = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= stops + ServerOptions().drain_timeout + 10
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    (mount,) = container["volumeMounts"]
    (cache,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--compile-cache=")]
    assert cache.startswith(f"{mount['mountPath']}/")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    disks = manifest(chip).get("StorageClass")
    assert claim["spec"].get("storageClassName") == (disks["metadata"]["name"] if disks else None)


def server_routes():
    class Unserved:
        class options:  # noqa: N801
            api_key = None

    return create_app(Unserved()).routes


@pytest.mark.parametrize("words", list(commands_of_the_folder()), ids=" ".join)
def test_arguments_are_understood(words, monkeypatch):
    """By the commands themselves, up to the point where they would begin."""
    command = cli.get_command(click.Context(cli), words[0])
    began = []
    monkeypatch.setattr(command, "callback", lambda **given: began.append(given))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    command.main(words[1:], standalone_mode=False)
    assert len(began) == 1


def test_image_keeps_what_the_volume_is_for():
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    (volume,) = re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE)
    (hub,) = re.findall(r"^ENV HF_HOME=(\S+)$", dockerfile, re.MULTILINE)
    caches = re.findall(r'"--compile-cache", "(\S+)"', dockerfile)
    assert hub.startswith(f"{volume}/")
    assert caches == [f"{volume}/programs", "/programs"]
    assert "COPY --from=programs / /programs" in dockerfile, "what warmup exported"
    assert re.findall(r"^FROM .*$", dockerfile, re.MULTILINE)[-1] == "FROM server", "the default needs no programs"


def test_the_context_holds_what_is_copied_and_nothing_that_was_built():
    lines = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert kept == set(re.findall(r"^COPY (?!--from)(\S+)", dockerfile, re.MULTILINE))
    assert {"*", "**/*.so", "**/*.egg-info"} <= set(lines)
    (built,) = re.findall(r"--wheel-dir /wheels \\\n\s+(.*)$", dockerfile, re.MULTILINE)
    names = [tomllib.loads((ROOT / path / "pyproject.toml").read_text())["project"]["name"] for path in built.split()]
    assert all(name in dockerfile.partition("--find-links")[2] for name in names)


def test_packages_and_extras_exist():
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    for text in (README, dockerfile, PAGE):
        for extras in re.findall(r"dovetail-tpu\[([\w,-]+)\]", text):
            assert set(extras.split(",")) <= set(EXTRAS), extras
        for name in re.findall(r"(?<![\w/-])dovetail-(core|models|quant|specdec|tpu)\b", text):
            assert (ROOT / name / "pyproject.toml").exists() or (ROOT / "plugins" / name / "pyproject.toml").exists()
    for path in re.findall(r"^COPY (?!--from)(\S+)", dockerfile, re.MULTILINE):
        assert (ROOT / path).exists(), path
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"torch==([\d.]+)", README) == re.findall(r"^torch==([\d.]+)", constraints, re.MULTILINE)
    for version in re.findall(r"libtpu==([\d.]+\d)", PAGE):
        assert f"libtpu=={version}\n" in constraints


def test_page_names_every_slice():
    (sentence,) = re.findall(r"The slices of one host are (.*?)\.\n", PAGE, re.DOTALL)
    assert set(re.findall(r"`([\w-]+)`", sentence)) == set(SLICES)
