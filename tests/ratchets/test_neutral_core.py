"""The core names no chip, no vendor and no model family: not in code, not in a string, not in a comment."""

import re
from pathlib import Path

CORE = Path(__file__).parents[2] / "core/src"

CHIPS = """
    cuda cudnn cublas cutlass cupti nccl nvml nvcc nvidia hopper ampere blackwell
    rocm rccl amd radeon instinct hipblas
    tpu tpus xpu xpus hpu npu npus intel habana gaudi apple mps
    ascend cann cambricon mlu musa trainium inferentia neuronx graphcore cerebras groq tenstorrent rebellions
    triton pallas jax torchax
"""
FAMILIES = """
    llama gemma gemini qwen mistral mixtral ministral deepseek falcon granite olmo starcoder baichuan chatglm glm
    internlm nemotron exaone minimax kimi bloom dbrx yi phi mamba pythia opt gpt
"""
NAMES = frozenset((CHIPS + FAMILIES).split())

COMPATIBILITY_METRICS = re.compile(r"(server/(metrics|prometheus)\w*|options)\.py$")
"""Where the metric names that gateways read may be spelt, and the option that switches them is described."""


def words(text):
    """Every word, also inside identifiers: ``is_fooChip2`` has ``is``, ``foo``, ``chip``."""
    text = text.replace("amd64", "")  # what Windows and Debian call an instruction set
    plain = re.findall(r"[A-Za-z]+", text)
    humps = re.findall(r"[A-Z]?[a-z]+", text)
    capitals = re.findall(r"[A-Z]+", text)
    heads = re.findall(r"[A-Z]+(?=[A-Z][a-z])", text)
    return {word.lower() for word in (*plain, *humps, *capitals, *heads)}


def lines():
    for path in sorted(CORE.rglob("*")):
        if path.suffix in (".py", ".pyi", ".c", ".cpp", ".h", ".jinja", ".json", ".yaml", ".toml"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield f"{path.relative_to(CORE)}:{number}", line


def test_words_are_found_wherever_they_hide():
    hidden = "is_cuda CudaPlatform TPUv5e Llama3 ROCm XPUGraph"
    assert {"cuda", "is", "platform", "tpu", "llama", "rocm", "xpu"} <= words(hidden)


def test_no_file_of_the_core_names_a_chip_a_vendor_or_a_model_family():
    found = [f"{place}: {sorted(words(line) & NAMES)}" for place, line in lines() if words(line) & NAMES]
    assert found == []


def test_no_file_name_of_the_core_either():
    assert [str(path) for path in CORE.rglob("*.*") if words(path.relative_to(CORE).as_posix()) & NAMES] == []


def test_compatibility_metric_names_are_confined():
    found = [
        place for place, line in lines() if "vllm" in line and not COMPATIBILITY_METRICS.search(place.split(":")[0])
    ]
    assert found == []
