"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import ModelManifest


@hookimpl
def dovetail_register_models(register: Callable[[ModelManifest, str], None]) -> None:
    """One family."""
    manifest = ModelManifest(
        name="phi",
        summary="Phi-1, Phi-1.5 and Phi-2.",
        architectures=("PhiForCausalLM",),
    )
    register(manifest, "dovetail_phi.model:Phi")
