"""The commands that run an engine in their own process, on the demo model."""

import io
import json
import logging
import sys

import pytest

from dovetail import LLM, SamplingParams
from dovetail.cli.main import run
from dovetail.testing.fake_plugins import install

ABSENT = """
from dovetail import hookimpl
from dovetail.contracts.platform import Probe
from dovetail.plugins.manifest import PlatformManifest
from dovetail.testing.platforms import ReferencePlatform

class Absent(ReferencePlatform):
    @classmethod
    def probe(cls):
        return Probe(available=False, reason="no abacus on the bus.")

@hookimpl
def dovetail_register_platforms(register):
    manifest = PlatformManifest(
        name="absent", summary="Not here.", device_type="cpu", dtypes=("float32",), attention=("reference",)
    )
    register(manifest, __name__ + ":Absent")
"""


@pytest.fixture(autouse=True)
def quiet_log():
    """The commands set up logging for their process; put it back."""
    logger = logging.getLogger("dovetail")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def expected(prompts, max_tokens):
    with LLM(platform="plain", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    return [output.outputs[0].text for output in outputs]


GREEDY = ["--temperature", "0", "--max-tokens", "8"]


def test_generate_streams_one_prompt(plain, capsys):
    (text,) = expected(["Once upon a time"], 8)
    assert run(["generate", *plain, "--prompt", "Once upon a time", *GREEDY]) == 0
    assert capsys.readouterr().out == f"Once upon a time{text}\n"
    assert text


def test_generate_from_a_file_that_is_no_text(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe\x00")
    assert run(["generate", "--file", str(file)]) == 2
    assert f"--file {file} cannot be read as text" in capsys.readouterr().err


def test_generate_prints_no_prompt_that_is_too_long(plain, capsys):
    assert run(["generate", *plain, "--prompt", "a fox and " * 200]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: This model's maximum context length is 256 tokens." in captured.err


def test_generate_json_from_file_and_flags(plain, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("The old king\n\nA fox\n")
    prompts = ["Once upon a time", "The old king", "A fox"]
    texts = expected(prompts, 8)
    assert run(["generate", *plain, "-p", prompts[0], "--file", str(file), *GREEDY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [output["prompt"] for output in found] == prompts
    assert [output["outputs"][0]["text"] for output in found] == texts
    assert all(o["outputs"][0]["finish_reason"] in ("length", "stop") for o in found)


def test_generate_several_completions_from_standard_input(plain, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n"))
    assert run(["generate", *plain, "--n", "2", *GREEDY]) == 0
    (text,) = expected(["Once upon a time"], 8)
    assert capsys.readouterr().out == f"Once upon a time{text}\n" * 2


def test_generate_without_a_prompt(plain, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(["generate", *plain]) == 2
    assert "There is no prompt; give one with --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--top-p", "2.0"), ("--n", "0")])
def test_generate_says_a_wrong_parameter_before_it_loads_anything(capsys, option, value):
    assert run(["generate", "no/such/folder", "-p", "x", option, value]) == 2
    assert f"error: {option} is {value}; it must be in " in capsys.readouterr().err


def test_refusal_names_everything_that_has_to_change(plain, capsys):
    assert (
        run(["generate", *plain, "-p", "x", "--attention", "refrence", "--kv-cache-memory", "1", "--dtype", "float16"])
        == 2
    )
    message = capsys.readouterr().err
    assert "error: Cannot run fable-4m as asked:" in message
    assert "Did you mean 'reference'?" in message
    assert "does not compute in --dtype float16; choose auto or float32." in message


def test_explain(plain, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["explain", *plain]) == 0
    shown = capsys.readouterr().out
    for text in ("plain (dist-plain 1.0)", "asked for with --platform", "attention cpu was not taken", "float32"):
        assert text in shown


def test_explain_json(plain, capsys):
    assert run(["explain", *plain, "--json"]) == 0
    explanation = json.loads(capsys.readouterr().out)
    assert explanation["reasons"] == []
    assert explanation["config"]["platform"]["distribution"] == "dist-plain"
    assert [part["part"] for part in explanation["parts"]] == [
        "platform",
        "model",
        "attention",
        "quantization",
        "speculation",
    ]


def test_explain_refusal(plain, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["explain", *plain, "--max-model-len", "4096"]) == 1
    shown = capsys.readouterr().out
    assert "--max-model-len 4096 exceeds the 2048 positions" in shown
    assert "Nearest that works: --max-model-len 2048 " in shown
    assert "(changed: --max-model-len 4096 → 2048)" in shown


def test_explain_says_each_reason_of_a_refusal_once(plain, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["explain", *plain, "--attention", "cpu", "--block-size", "20"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("has no 20-token blocks") == 1
    assert "attention backend 'cpu' of plugin 'builtin'" in shown
    assert "attention cpu was not taken" not in shown


def test_explain_says_once_why_a_platform_is_not_here(capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    module = install(tmp_path, "absent", ABSENT)
    assert run(["explain", "--platform", "absent"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("no abacus on the bus") == 1
    assert "platform 'absent' of plugin 'absent'" in shown
    sys.modules.pop(module)


def test_explain_fallback(plain, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["explain", *plain, "--max-model-len", "4096", "--allow-fallback"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert "With --allow-fallback this runs instead:\n  - --max-model-len 4096 → 2048, since --max-model-len" in shown
    assert run([*words, "--json"]) == 0
    explanation = json.loads(capsys.readouterr().out)
    assert explanation["config"]["fallbacks"] == explanation["nearest"]["changes"]
    assert explanation["config"]["max_model_len"] == 2048


def test_generate_with_fallback_runs_and_warns(plain, capsys):
    words = ["generate", *plain, "-p", "Once", "--max-model-len", "4096", *GREEDY]
    assert run(words) == 2
    assert "Nearest that works: --max-model-len 2048 " in capsys.readouterr().err
    assert run([*words, "--allow-fallback"]) == 0
    captured = capsys.readouterr()
    assert "Fallback: --max-model-len 4096 → 2048" in captured.err
    assert captured.out.startswith("Once")


@pytest.mark.parametrize("output_len", [1, 3])
def test_bench_latency(plain, capsys, output_len):
    words = ["--runs", "2", "--input-len", "5", "--output-len", str(output_len), "--json"]
    assert run(["bench", "latency", *plain, *words]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert 0 < numbers["ttft_p50_ms"] <= numbers["e2e_p50_ms"]
    assert ("tpot_p50_ms" in numbers) == (output_len > 1)


def test_bench_throughput(plain, capsys):
    words = ["--num-prompts", "6", "--input-len", "5", "--output-len", "3", "--json"]
    assert run(["bench", "throughput", *plain, *words]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["requests"], numbers["input_tokens"], numbers["output_tokens"]) == (6, 30, 18)
    assert numbers["total_tokens_per_second"] == pytest.approx(48 / numbers["seconds"])


def test_warmup_ends_with_what_is_kept(plain, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "elsewhere"))
    assert run(["warmup", *plain, "--export-cache", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is warmed up on plain after" in lines[0]
    assert lines[1:] == [f"There was nothing to keep in {folder}."], "this platform compiles nothing"


def test_warmup_has_one_folder(capsys, tmp_path):
    assert run(["warmup", "--export-cache", str(tmp_path), "--compile-cache", "other"]) == 2
    assert "--export-cache is" in capsys.readouterr().err
