"""A plugin built for version 1 of every contract, kept as it was: it must keep loading and giving right tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dovetail.checkpoint import demo
from dovetail.contracts import API_VERSIONS, accepted

FROZEN = Path(__file__).parents[1] / "frozen"
FOSSIL = FROZEN / "dovetail-fossil"
PROMPTS = ["The king said to the fox: “Give me the ring.” The fox said to the king: “", "Once upon a time there was"]
KINDS = {"platforms", "attention", "models", "quant", "spec_decoders"}


def checksums():
    found = {}
    for file in FOSSIL.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            found[file.relative_to(FOSSIL).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def test_it_is_never_edited():
    lines = (FROZEN / "dovetail-fossil.sha256").read_text().splitlines()
    assert checksums() == {name: digest for digest, name in (line.split() for line in lines)}


def test_it_is_still_accepted():
    assert all(1 in accepted(contract) for contract in API_VERSIONS), "freeze another, and remove that of version 1"


@pytest.fixture(scope="module")
def site(install_source):
    return install_source(FOSSIL)


@pytest.fixture(scope="module")
def demo_model():
    from dovetail_models import plugin

    found = []
    plugin.dovetail_register_models(lambda manifest, target: found.append(manifest.demo))
    return demo(next(name for name in found if name))


def rewritten(source: Path, folder: Path, **config) -> Path:
    """A copy of a checkpoint with other fields in its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


@pytest.fixture(scope="module")
def renamed(demo_model, tmp_path_factory):
    """The demo checkpoint as one of the fossil's family."""
    return rewritten(demo_model, tmp_path_factory.mktemp("m") / "renamed", architectures=["FossilForCausalLM"])


@pytest.fixture(scope="module")
def quantized(demo_model, tmp_path_factory):
    """The demo checkpoint in the fossil's number format."""
    section = {"quant_method": "fossil", "bits": 16}
    folder = rewritten(demo_model, tmp_path_factory.mktemp("m") / "quantized", quantization_config=section)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = torch.exp2(tensor.float().abs().amax(1, keepdim=True).log2().ceil())
            tensors[name] = (tensor.float() / scale).to(torch.bfloat16).view(torch.int16)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def ran(site, small, renamed, quantized):
    """Greedy tokens with the core's own parts, with each of the fossil's, and with all; and how that is explained."""
    speculation = ["--speculative-config", '{"method": "fossil"}']
    parts = {
        "the core": [],
        "platform": ["--platform", "fossil", "--attention", "reference"],
        "attention": ["--attention", "fossil"],
        "quantization": ["--quantization", "fossil"],
        "checkpoint": [str(quantized)],
        "model": [str(renamed)],
        "speculation": speculation,
        "everything": [str(renamed), "--platform", "fossil", "--quantization", "fossil", *speculation],
    }
    texts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    generate = ["generate", *texts, "--max-tokens", "32", "--temperature", "0", "--dtype", "float32", "--json", *small]
    commands = {name: [*generate, *options] for name, options in parts.items()}
    commands["explanation"] = ["explain", "--json", "--dtype", "float32", *parts["everything"]]
    return site.dovetail_all(commands)


def test_it_loads_without_a_word(site):
    fossil = site.plugins()["fossil"]
    assert (fossil["state"], fossil["distribution"], fossil["version"]) == ("loaded", "dovetail-fossil", "1.0.0")
    assert fossil["provides"] == {kind: ["fossil"] for kind in KINDS}
    assert fossil["warnings"] == []


def test_the_resolver_takes_all_of_it(ran):
    done = ran["explanation"]
    assert done.code == 0, done.out + done.err
    parts = json.loads(done.out)["parts"]
    assert {part["chosen"]["name"] for part in parts} == {"fossil"}
    assert {part["plugin"] for part in parts} == {"fossil"}


@pytest.mark.parametrize(
    "part", ["platform", "attention", "quantization", "checkpoint", "model", "speculation", "everything"]
)
def test_tokens_equal_those_of_the_core(ran, part):
    assert ran[part].code == 0, ran[part].err
    completions, expected = (json.loads(ran[name].out) for name in (part, "the core"))
    assert completions == expected
    assert [completion["outputs"][0]["tokens"] for completion in completions] == [32, 32]
