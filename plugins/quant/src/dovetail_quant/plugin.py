"""What dovetail-quant registers. Imports nothing heavy."""

from __future__ import annotations

from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import QuantManifest

EXPERTS = frozenset({"quantized_experts_pack", "quantized_experts_mm"})
WEIGHT_ONLY = EXPERTS | {"quantize_rows", "weight_only_pack", "weight_only_mm"}
SCALED = EXPERTS | {"quantize_rows", "scaled_mm_pack", "scaled_mm"}
BLOCK_SCALED = EXPERTS | {"quantize_rows", "block_scaled_pack", "block_scaled_mm"}
FOUR_BITS = EXPERTS | {"w4a16_mm"}


@hookimpl
def dovetail_register_quant_methods(register: Register[QuantManifest]) -> None:
    """8-bit weights, with activations as they are or in 8 bits as well; and checkpoints with 4-bit weights."""
    register(
        QuantManifest(
            name="int8",
            summary="int8 weights, one scale per output; activations stay as they are.",
            on_load=True,
            experts=True,
            ops=WEIGHT_ONLY,
        ),
        "dovetail_quant.weight_only:Int8",
    )
    register(
        QuantManifest(
            name="int8-w8a8",
            summary="int8 weights, one scale per output; int8 activations, one scale per token.",
            on_load=True,
            experts=True,
            ops=SCALED,
        ),
        "dovetail_quant.w8a8:Int8W8A8",
    )
    register(
        QuantManifest(
            name="fp8",
            summary="fp8 (e4m3) weights, one scale per output; also reads checkpoints in fp8.",
            checkpoint_methods=("fp8",),
            on_load=True,
            experts=True,
            ops=WEIGHT_ONLY | SCALED | BLOCK_SCALED,
        ),
        "dovetail_quant.fp8:Fp8",
    )
    register(
        QuantManifest(
            name="fp8-w8a8",
            summary="fp8 (e4m3) weights, one scale per output; fp8 activations, one scale per token.",
            on_load=True,
            experts=True,
            ops=SCALED,
        ),
        "dovetail_quant.w8a8:Fp8W8A8",
    )
    register(
        QuantManifest(
            name="gptq",
            summary="4-bit weights of GPTQ checkpoints, in groups; activations stay as they are.",
            checkpoint_methods=("gptq",),
            experts=True,
            error=0.2,
            ops=FOUR_BITS,
        ),
        "dovetail_quant.gptq:Gptq",
    )
    register(
        QuantManifest(
            name="awq",
            summary="4-bit weights of AWQ checkpoints, in groups; activations stay as they are.",
            checkpoint_methods=("awq",),
            experts=True,
            error=0.2,
            ops=FOUR_BITS,
        ),
        "dovetail_quant.awq:Awq",
    )
