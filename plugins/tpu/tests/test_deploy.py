"""What is said of deployment agrees with the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from dovetail_tpu.slices import SLICES

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy/tpu"
LABELS = {"v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "plugins/tpu/README.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "plugins/tpu/pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("chip", LABELS)
def test_manifests_ask_for_whole_slices(chip):
    deployment, claim, service = yaml.safe_load_all((FOLDER / f"gke-{chip}.yaml").read_text(encoding="utf-8"))
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
