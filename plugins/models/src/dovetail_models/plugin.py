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
)


@hookimpl
def dovetail_register_models(register: Register[ModelManifest]) -> None:
    """One entry per family."""
    for manifest, target in FAMILIES:
        register(manifest, target)
