"""The third-party packages under ``examples/``, as strangers meet them: built, installed elsewhere, served."""

from __future__ import annotations

import ast
import json
import shutil
import tomllib
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(folder.name for folder in (ROOT / "examples").iterdir() if folder.is_dir())
PUBLIC = ("contracts", "layers", "ops", "errors", "testing", "plugins.manifest")
"""Modules of the core that an author may import, beside ``dovetail`` itself."""
PROMPT = "The king said to the fox: “Give me the ring.” The fox said to the king: “"
SUFFIX = ("--speculative-config", '{"method": "suffix"}')


def complete(url, **body):
    answer = httpx.post(f"{url}/v1/completions", json={"temperature": 0, **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_they_import_what_is_public_and_no_other_plugin(example):
    own = example.replace("-", "_")
    for file in (ROOT / "examples" / example).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, _, rest = name.partition(".")
                assert not package.startswith("dovetail_") or package == own, (file, name)
                assert package != "dovetail" or not rest or rest.startswith(PUBLIC), (file, name)


def test_nothing_in_the_environment_comes_from_the_workspace(environment):
    modules = ["dovetail", "dovetail_models", *(example.replace("-", "_") for example in EXAMPLES)]
    script = f"import importlib; print(*(importlib.import_module(m).__file__ for m in {modules!r}), sep='\\n')"
    files = environment.run(["python", "-c", script]).splitlines()
    assert len(files) == len(modules)
    assert [file for file in files if not file.startswith(str(environment.folder))] == []
    found = json.loads(environment.run(["dovetail", "plugins", "--json"]))["plugins"]
    assert {plugin["name"]: plugin["state"] for plugin in found} == dict.fromkeys(
        ["builtin", "models", *(example.removeprefix("dovetail-") for example in EXAMPLES)], "loaded"
    )


def test_explain_names_each_of_them(environment):
    asked = ["--platform", "abacus", "--quantization", "nibble", *SUFFIX]
    text = environment.run(["dovetail", "explain", *asked])
    for name, example in (("abacus", "abacus"), ("nibble", "nibble"), ("suffix", "suffix")):
        assert f"{example} (dovetail-{example} 0.1.0)" in text, name


def test_a_server_on_the_abacus_answers_as_the_cpu_does(environment):
    plain = ["dovetail", "generate", "--dtype", "float32", "--temperature", "0", "--max-tokens", "24"]
    expected = environment.run([*plain, "--max-model-len", "256", "--prompt", PROMPT])
    with environment.serve("--platform", "abacus", *SUFFIX) as url:
        assert httpx.get(f"{url}/v1/config").json()["engine"]["platform"]["name"] == "abacus"
        text = complete(url, prompt=PROMPT, max_tokens=24)
    assert len(text) > 24
    assert text in expected


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_their_own_tests_pass_there(example, environment, tmp_path):
    # Outside of the workspace, so that its settings of pytest do not count.
    copy = shutil.copytree(ROOT / "examples" / example, tmp_path / example)
    environment.run(["pytest", "-q", "-p", "no:asyncio", "-W", "error", "tests"], cwd=copy)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_they_conform_there(example, environment):
    (name,) = tomllib.loads((ROOT / "examples" / example / "pyproject.toml").read_text())["project"]["entry-points"][
        "dovetail"
    ]
    report = environment.run(["dovetail", "conformance", name, "--format", "json"])
    parts = json.loads(report)["parts"]
    assert all(any(scenario["outcome"] == "passed" for scenario in part["scenarios"]) for part in parts)
    assert json.loads(report)["conforms"]


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory):
    """A random checkpoint of the example's family, with one token per byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PhiConfig, PhiForCausalLM

    folder = tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
def test_all_of_them_serve_together(tiny_phi, environment):
    """Family, format, speculator and chip of four strangers: the tokens are those of the CPU without speculation."""
    prompt = [9, 40, 77, 9, 40, 77, 9, 40]
    request = {"prompt": prompt, "max_tokens": 48, "ignore_eos": True, "logprobs": 1}
    texts = []
    for options in (("--platform", "abacus", *SUFFIX), ("--platform", "cpu", "--dtype", "float32")):
        with environment.serve(str(tiny_phi), "--quantization", "nibble", *options) as url:
            served = httpx.get(f"{url}/v1/config").json()["engine"]
            texts.append(complete(url, **request))
        assert [served[part]["name"] for part in ("platform", "model", "quant")] == [options[1], "phi", "nibble"]
    assert texts[0] == texts[1]
