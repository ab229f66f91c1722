"""LoadedModel: a checkpoint in device memory, with the attention backend it runs on; it has no KV cache yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dovetail.config import EngineConfig
from dovetail.contracts.attention import AttentionBackend
from dovetail.contracts.executor import KVGroup, Progress
from dovetail.contracts.model import Model, ModelContext, ModelFacts
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, ShapePolicy
from dovetail.contracts.quant import QuantMethod
from dovetail.errors import ConfigError, ModelLoadError
from dovetail.runner import kv_memory, quant_check, self_check
from dovetail.runner.dummy_weights import fill_with_noise
from dovetail.runner.forward import ForwardPass
from dovetail.runner.load import load_selection
from dovetail.runner.loader import load_weights, weight_bytes
from dovetail.runner.slots import SlotTables
from dovetail.sizes import size


@contextmanager
def _naming_readers(config: EngineConfig) -> Iterator[None]:
    """Tensors that do not fit may be the fault of whoever said which to expect."""
    try:
        yield
    except ModelLoadError as error:
        readers = [("Model", config.model), ("number format", config.quant)]
        names = " and ".join(f"{noun} {part.name!r} of {part.owner}" for noun, part in readers)
        error.args = (f"{error}\n{names} say which tensors to expect; if the files are right, report it to them.",)
        raise


def unfilled(config: EngineConfig, ops: OpTable, device: torch.device) -> Model:
    """The model that a configuration names, before its blocks have tensors.

    Raises:
        PluginLoadError: its number format does not do what it claims; see :mod:`dovetail.runner.quant_check`.
    """
    model_class: type[Model] = load_selection(config.model)
    quant: QuantMethod = load_selection(config.quant)(config.hf_config.get("quantization_config"))
    context = ModelContext(
        ops=ops,
        dtype=getattr(torch, config.dtype),
        device=device,
        quant=quant,
        max_model_len=config.max_model_len,
    )
    model = model_class(config.hf_config, context)
    quant_check.check_use(config.quant, quant, model)
    if "quantization_config" not in config.hf_config:
        quant_check.check_product(config.quant, quant, context.dtype)
    return model


def _fill(config: EngineConfig, model: Model, platform: Platform, progress: Progress) -> None:
    """Bring the weights into device memory.

    Raises:
        ConfigError: they do not fit; says how much is missing.
    """
    needed, free = weight_bytes(model), platform.memory().available
    try:
        if config.load_format == "dummy":
            fill_with_noise(model, progress)
        else:
            load_weights(model, Path(config.model_path), progress, platform.staging)
    except torch.OutOfMemoryError as error:
        missing = f", so {size(needed - free)} are missing" if needed > free else ""
        raise ConfigError(
            f"The weights of {config.model_name} take {size(needed)} as they are loaded, and {size(free)} are free on "
            f"the device{missing}. Quantize them (--quantization), choose a smaller model, or free memory. ({error})"
        ) from error


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model on a platform, and what it takes to run it."""

    config: EngineConfig
    platform: Platform
    facts: ModelFacts
    model: Model
    backend: AttentionBackend

    @classmethod
    def load(cls, config: EngineConfig, platform: Platform, ops: OpTable, progress: Progress) -> LoadedModel:
        """Build the model that a configuration names, fill it from its checkpoint, and build its backend, which is not
        checked yet.
        """
        dtype: torch.dtype = getattr(torch, config.dtype)
        with torch.inference_mode(), _naming_readers(config):
            model = unfilled(config, ops, platform.device)
            _fill(config, model, platform, progress)
            model = platform.adopt(model)
        backend: AttentionBackend = load_selection(config.attention)(
            ops=ops,
            device=platform.device,
            dtype=dtype,
            kv_dtype=getattr(torch, config.kv_dtype),
            block_size=config.block_size,
        )
        return cls(config, platform, type(model).facts(config.hf_config), model, backend)

    def check_attention(self, shapes: ShapePolicy) -> None:
        """See :func:`dovetail.runner.self_check.check_attention`."""
        self_check.check_attention(self.config, self.platform, shapes, self.backend, self.facts.attention)

    def block_bytes(self, groups: Sequence[KVGroup]) -> int:
        """Bytes of one block of its KV cache."""
        return kv_memory.block_bytes(self.facts.attention, groups, self.backend)

    def forward_pass(
        self,
        groups: Sequence[KVGroup],
        blocks: int,
        tables: SlotTables,
        shapes: ShapePolicy,
        logits_per_request: int,
    ) -> ForwardPass:
        """Allocate a cache of that many blocks, and make the model ready to run over it."""
        return ForwardPass(
            platform=self.platform,
            model=self.model,
            backend=self.backend,
            specs=self.facts.attention,
            groups=groups,
            caches=kv_memory.allocate(self.facts.attention, groups, self.backend, blocks),
            tables=tables,
            shapes=shapes,
            logits_per_request=logits_per_request,
        )
