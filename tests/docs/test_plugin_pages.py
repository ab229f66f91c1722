"""The pages on plugins do what they promise, from their own files."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import httpx
import pytest
import torch

from dovetail import LLM, SamplingParams
from dovetail.checkpoint import demo
from dovetail.cli.main import run
from dovetail.cli.new import scaffold
from dovetail.contracts import API_VERSIONS
from dovetail.contracts.attention import AttentionBackend
from dovetail.contracts.executor import Executor
from dovetail.contracts.model import Model
from dovetail.contracts.platform import Platform
from dovetail.contracts.quant import QuantMethod
from dovetail.contracts.specdec import SpecDecoder
from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors
from dovetail.plugins.host import PluginHost

CONTRACTS = {
    "platform": (Platform, "platform", "dovetail_register_platforms"),
    "attention": (AttentionBackend, "attention", "dovetail_register_attention_backends"),
    "model": (Model, "model", "dovetail_register_models"),
    "quant": (QuantMethod, "quant", "dovetail_register_quant_methods"),
    "specdec": (SpecDecoder, "specdec", "dovetail_register_spec_decoders"),
    "executor": (Executor, "executor", "dovetail.engine.engine.Engine"),
}
SMALL = ["--num-threads", "1", "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
PROMPT = "The king said to the fox: “Give me the ring.” The fox said to the king: “"


def greedy(prompts, tokens=32, **options):
    """Greedy tokens of the demo model, and how many steps they took."""
    with LLM(num_threads=1, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        return [output.outputs[0].token_ids for output in outputs], llm.stats().steps


def test_platform(installed):
    page = installed("docs/plugins/platform.md")
    assert "abacus" in page.dovetail("plugins")
    (explain,) = page.page.dovetail("explain")
    assert re.search(r"platform +│ abacus", page.dovetail(*explain))
    (generate,) = page.page.dovetail("generate")
    reference = [word if word != "abacus" else "cpu" for word in generate]
    assert page.dovetail(*generate, *SMALL) == page.dovetail(*reference, *SMALL, "--dtype", "float32")


def test_platform_serves(server):
    model = httpx.get(f"{server.url}/v1/config").json()["engine"]
    assert model["platform"]["name"] == "abacus"
    body = {"prompt": [PROMPT] * 3, "max_tokens": 16, "temperature": 0}
    choices = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert len(choices[0]["text"]) > 16
    assert len({choice["text"] for choice in choices}) == 1


def test_attention(installed):
    page = installed("docs/plugins/attention.md")
    page.python("check.py")
    (arguments,) = page.page.dovetail("generate")
    chalk = page.dovetail(*arguments, *SMALL, "--dtype", "float32")
    reference = [word if word != "chalk" else "reference" for word in arguments]
    assert chalk == page.dovetail(*reference, *SMALL, "--dtype", "float32")


def test_attention_check_can_fail(installed):
    page = installed("docs/plugins/attention.md")
    file = page.site / "dovetail_chalk/attention.py"
    file.write_text(file.read_text().replace("(window or length)", "length"))
    with pytest.raises(AssertionError, match="not close"):
        page.python("check.py")


def test_model(installed):
    page = installed("docs/plugins/model.md")
    names = page.python("check.py")
    assert [len(tokens) for tokens in names["ours"]] == [24, 24, 24]


def test_model_check_can_fail(installed):
    page = installed("docs/plugins/model.md")
    file = page.site / "dovetail_smollm3/model.py"
    file.write_text(file.read_text().replace("turning if turns else still", "turning"))
    with pytest.raises(AssertionError):
        page.python("check.py")


def test_quant(installed, tmp_path):
    page = installed("docs/plugins/quant.md")
    (explain,) = page.page.dovetail("explain")
    assert re.search(r"quantization +│ rows", page.dovetail(*explain))
    on_load, stored = page.page.dovetail("generate")
    (convert,) = [shlex.split(line)[1:] for line in page.page.commands() if line.startswith("python convert.py")]
    checkpoint = next(e for e in PluginHost().discover().registries.models if e.manifest.demo).manifest.demo
    places = {"path/to/checkpoint": str(demo(checkpoint)), "path/to/quantized": str(tmp_path / "quantized")}
    page.python(*(places.get(word, word) for word in convert))
    texts = [page.dovetail(*(places.get(word, word) for word in line), *SMALL) for line in (on_load, stored)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 40


def test_quant_is_close_to_plain(installed):
    """Greedy text of a small model may differ; its first tokens do not, and the weights really are int8."""
    installed("docs/plugins/quant.md")
    from dovetail_rows.method import quantize

    weight = torch.randn(64, 32)
    values, scale = quantize(weight)
    assert values.dtype == torch.int8
    assert (values.float() * scale - weight).abs().max() <= scale.max() / 2 + 1e-6
    plain, _ = greedy([PROMPT], 4, dtype="float32")
    quantized, _ = greedy([PROMPT], 4, dtype="float32", quantization="rows")
    assert plain == quantized


def test_specdec(installed):
    page = installed("docs/plugins/specdec.md")
    (explain,) = page.page.dovetail("explain")
    assert re.search(r"speculation +│ echo", page.dovetail(*explain))
    plain, plain_steps = greedy([PROMPT], 96)
    config = {"method": "echo"}
    echoed, echoed_steps = greedy([PROMPT], 96, speculative_config=config)
    assert echoed == plain
    assert echoed_steps < plain_steps


def test_coupled_drafts_are_what_is_sampled(read_page):
    """By a drafter with the model's own logits."""
    snippet = {}
    (code,) = read_page("docs/plugins/specdec.md").blocks("python")
    exec(code, snippet)
    requests = torch.arange(60)
    logits, temperature = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)), (requests % 3) * 0.5
    params = SamplingTensors(
        temperature_S=temperature, top_k_S=torch.zeros(60, dtype=torch.int64), top_p_S=torch.ones(60),
        min_p_S=torch.zeros(60), seeds_S=requests, positions_S=requests * 7, all_greedy=False, any_filter=False,
    )  # fmt: skip
    assert torch.equal(snippet["draft"](logits, temperature, requests, requests * 7), reference.sample(logits, params))


def test_command(installed, server, capsys):
    page = installed("docs/plugins/command.md")
    assert re.search(r"ping +Ask a running server whether it is well\. \(plugin 'ping'\)", page.dovetail("--help"))
    asking = next(arguments for arguments in page.page.dovetail("ping") if "--url" in arguments)
    assert page.dovetail(*asking[:-1], server.url) == "It is well.\n"
    assert run(["ping", "--url", "http://127.0.0.1:1"]) == 1
    assert "error: Nothing answers at http://127.0.0.1:1 (" in capsys.readouterr().err


def test_engine_options_of_a_command(read_page, capsys):
    names = {}
    (code,) = read_page("docs/plugins/command.md").blocks("python")
    exec(code, names)
    names["show"].main([], standalone_mode=False)
    names["show"].main(["a/model", "--max-model-len", "64", "--json"], standalone_mode=False)
    assert capsys.readouterr().out == "whatever fits\n64\n"


def test_executor(read_page, tmp_path, capsys):
    page = read_page("docs/plugins/executor.md")
    (file,) = page.files()
    (tmp_path / file).write_text(page.files()[file])
    runpy.run_path(str(tmp_path / file))
    assert page.blocks("console") == [f"$ python {file}\n{capsys.readouterr().out}"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("platform", "abacus"), ("attention", "chalk"), ("quant", "rows"), ("specdec", "echo"), ("command", "ping")],
)
def test_examples_are_what_dovetail_new_writes(kind, name, read_page, tmp_path):
    scaffold(kind, name, tmp_path / "package")
    files = read_page(f"docs/plugins/{kind}.md").files()
    modules = {title: body for title, body in files.items() if title.startswith("dovetail_")}
    assert len(modules) == 2
    for title, body in modules.items():
        assert (tmp_path / "package/src" / title).read_text(encoding="utf-8") == body


def test_commands_of_the_overview(read_page, capsys):
    lines = [shlex.split(line)[1:] for line in read_page("docs/plugins/README.md").commands()]
    assert len(lines) >= 7
    for arguments in lines:
        with mock.patch.dict("os.environ"):
            assert run(arguments) == 0, arguments
    printed, traced = capsys.readouterr()
    assert "disabled" in printed
    assert "dovetail hook: models" in traced


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_method_is_described(name):
    cls, contract, hook = CONTRACTS[name]
    text = Path(__file__).parents[2].joinpath(f"docs/plugins/{name}.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)(?:\([^`]*\))?` \| (.+) \|$", text, re.MULTILINE))
    assert set(cls.__abstractmethods__) <= set(rows), "methods without a line"
    assert f"version {API_VERSIONS[contract]}" in text
    assert hook in text
    for method in cls.__abstractmethods__:
        described = re.search(rf"^\| `{method}\(([^`]*)\)`", text, re.MULTILINE)
        if described:
            parameters = inspect.signature(getattr(cls, method)).parameters
            given = [word.strip() for word in described[1].split(",") if word.strip() not in ("", "*")]
            assert given == [parameter for parameter in parameters if parameter != "self"], method
