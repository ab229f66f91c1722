"""Manifests: what a plugin declares about each thing it registers, readable without importing that thing.

The resolver matches manifests alone, so listing and explaining plugins never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What every registration declares.

    Attributes:
        name: the name that users type; unique within its kind.
        summary: one line for ``dovetail plugins``.
        api: the contract version that the implementation was written for.
        priority: among candidates that all fit, the highest is chosen.
        requires: what must be installed beside the plugin's own dependencies, as PEP 508 requirements (``"fancy>=2"``);
            checked before the target is imported.
        extra: name of the distribution's extra that brings those. With one, that they are missing is somebody's choice,
            and no warning; who asks for it nevertheless is told to install the extra.
    """

    name: str
    summary: str
    api: int = 1
    priority: int = 0
    requires: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformManifest(Manifest):
    """A chip.

    Attributes:
        device_type: the torch device type that its tensors live on.
        dtypes: activation dtypes it can compute in, most preferred first.
        attention: names of attention backends that it can run, most preferred first.
        ops: names of the operations that it overrides; the rest run on the reference implementations.
        kv_dtypes: storage dtypes of the KV cache that it can hold, ``"auto"`` being the activation dtype; empty means
            any that the attention backend stores.
        max_context: longest context that it can run, in tokens; None means any.
        defaults: default values of its own section, ``--platform-config``.
        asynchronous: the device works on its own: what is submitted to it returns before it has run, so that the host
            can plan the next step meanwhile.
    """

    device_type: str
    dtypes: tuple[str, ...]
    attention: tuple[str, ...]
    ops: frozenset[str] = frozenset()
    kv_dtypes: tuple[str, ...] = ()
    max_context: int | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    asynchronous: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionManifest(Manifest):
    """An attention backend.

    Attributes:
        device_types: torch device types that it runs on.
        dtypes: activation dtypes it accepts.
        kv_dtypes: storage dtypes of the KV cache; ``"auto"`` means the activation dtype. What is stored as integers the
            backend scales itself.
        head_sizes: supported head sizes; empty means any.
        block_sizes: supported tokens per KV block; empty means any.
        sliding_window, soft_cap, mla, tree: optional capabilities, closed by default.
        verify: several query tokens per request that need logits each (draft verification).
        max_context: longest context that it can attend to, in tokens; None means any.
    """

    device_types: tuple[str, ...]
    dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...] = ("auto",)
    head_sizes: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] = ()
    sliding_window: bool = False
    soft_cap: bool = False
    mla: bool = False
    tree: bool = False
    verify: bool = False
    max_context: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelManifest(Manifest):
    """A model family.

    Attributes:
        architectures: values of ``architectures`` in config.json that it serves.
        platform: a platform name if this is that platform's own override of the family, else None.
        demo: ``"package:folder"`` of a checkpoint shipped as package data, served when no model is named.
        dtypes: activation dtypes that it computes right in; empty means any.
    """

    architectures: tuple[str, ...]
    platform: str | None = None
    demo: str | None = None
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantManifest(Manifest):
    """A number format for weights.

    Attributes:
        checkpoint_methods: values of ``quantization_config.quant_method`` that it may recognise.
        on_load: it can quantize an unquantized checkpoint while loading (``--quantization NAME``).
        ops: operations that it needs from the platform's op table.
        dtypes: activation dtypes it works with; empty means any.
        device_types: torch device types that it runs on; empty means any.
        experts: optional capability, closed by default: the stacked expert weights of sparse models.
        error: largest error that the format makes in one layer of normally distributed weights and inputs, root mean
            square relative to the exact product; conformance holds it to that.
    """

    checkpoint_methods: tuple[str, ...] = ()
    on_load: bool = False
    ops: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ()
    device_types: tuple[str, ...] = ()
    experts: bool = False
    error: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecDecoderManifest(Manifest):
    """A speculative decoder.

    Attributes:
        needs_draft_model: ``--speculative-config`` must name a draft checkpoint.
        probabilities: it can return draft probabilities (exact stochastic verification with real q).
        defaults: default values of its own section of ``--speculative-config``.
        needs: capabilities that verifying its drafts takes of the attention backend, by manifest field name.
        device_types: torch device types that it runs on; empty means any.
    """

    needs_draft_model: bool = False
    probabilities: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    needs: frozenset[str] = frozenset({"verify"})
    device_types: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandManifest(Manifest):
    """A command of ``dovetail``; ``summary`` is its line in ``dovetail --help``."""
