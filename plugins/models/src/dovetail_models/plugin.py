"""What this distribution registers. Imports nothing heavy."""

from __future__ import annotations

from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import ModelManifest

FAMILIES = (
    (
        ModelManifest(
            name="llama",
            summary="Llama 2, 3 and later dense models of the same shape.",
            architectures=("LlamaForCausalLM",),
            demo="dovetail_models:checkpoints/fable-4m",
        ),
        "dovetail_models.llama:Llama",
    ),
    (
        ModelManifest(
            name="mistral",
            summary="Mistral 7B and Nemo, with or without sliding window.",
            architectures=("MistralForCausalLM",),
        ),
        "dovetail_models.mistral:Mistral",
    ),
    (
        ModelManifest(
            name="qwen2",
            summary="Qwen2 and Qwen2.5 dense models.",
            architectures=("Qwen2ForCausalLM",),
        ),
        "dovetail_models.qwen2:Qwen2",
    ),
    (
        ModelManifest(
            name="qwen3",
            summary="Qwen3 dense models.",
            architectures=("Qwen3ForCausalLM",),
        ),
        "dovetail_models.qwen3:Qwen3",
    ),
    (
        ModelManifest(
            name="qwen3_moe",
            summary="Qwen3 models with experts.",
            architectures=("Qwen3MoeForCausalLM",),
        ),
        "dovetail_models.qwen3_moe:Qwen3Moe",
    ),
    (
        ModelManifest(
            name="mixtral",
            summary="Mixtral 8x7B, 8x22B and others of the same shape.",
            architectures=("MixtralForCausalLM",),
        ),
        "dovetail_models.mixtral:Mixtral",
    ),
    (
        ModelManifest(
            name="gemma2",
            summary="Gemma 2.",
            architectures=("Gemma2ForCausalLM",),
        ),
        "dovetail_models.gemma2:Gemma2",
    ),
    (
        ModelManifest(
            name="gemma3",
            summary="Gemma 3, text alone.",
            architectures=("Gemma3ForCausalLM",),
        ),
        "dovetail_models.gemma3:Gemma3",
    ),
)


@hookimpl
def dovetail_register_models(register: Register[ModelManifest]) -> None:
    """One entry per family."""
    for manifest, target in FAMILIES:
        register(manifest, target)
