"""One of each kind, for version 1 of every contract. Imports nothing heavy."""

from dovetail import hookimpl
from dovetail.plugins.manifest import (
    AttentionManifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)


@hookimpl
def dovetail_register_platforms(register):
    manifest = PlatformManifest(
        name="fossil",
        summary="A platform of the first version.",
        api=1,
        priority=-10,
        device_type="cpu",
        dtypes=("float32",),
        attention=("fossil", "reference"),
        ops=frozenset({"silu_and_mul"}),
    )
    register(manifest, "dovetail_fossil.platform:FossilPlatform")


@hookimpl
def dovetail_register_attention_backends(register):
    manifest = AttentionManifest(
        name="fossil",
        summary="An attention backend of the first version.",
        api=1,
        device_types=("cpu",),
        dtypes=("bfloat16", "float32"),
        kv_dtypes=("auto",),
        sliding_window=True,
        verify=True,
    )
    register(manifest, "dovetail_fossil.attention:FossilAttention")


@hookimpl
def dovetail_register_models(register):
    manifest = ModelManifest(
        name="fossil", summary="A model family of the first version.", api=1, architectures=("FossilForCausalLM",)
    )
    register(manifest, "dovetail_fossil.model:Fossil")


@hookimpl
def dovetail_register_quant_methods(register):
    manifest = QuantManifest(
        name="fossil",
        summary="A number format of the first version; it loses nothing of bfloat16.",
        api=1,
        checkpoint_methods=("fossil",),
        on_load=True,
        dtypes=("bfloat16", "float32"),
    )
    register(manifest, "dovetail_fossil.quant:FossilFormat")


@hookimpl
def dovetail_register_spec_decoders(register):
    manifest = SpecDecoderManifest(
        name="fossil",
        summary="A speculator of the first version.",
        api=1,
        defaults={"num_speculative_tokens": 4, "match": 2},
    )
    register(manifest, "dovetail_fossil.decoder:FossilDecoder")
