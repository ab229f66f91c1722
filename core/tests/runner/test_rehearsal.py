"""What runs before the first request: the largest step, on a platform that counts, and the sampler in every way."""

from __future__ import annotations

import gc
import re
import weakref
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch

from dovetail import sizes
from dovetail.contracts.executor import ExecutorInfo, Progress
from dovetail.contracts.platform import Bucket, MemoryInfo
from dovetail.errors import ConfigError
from dovetail.ops import reference
from dovetail.runner import kv_memory, loaded_model
from dovetail.runner.executor import LocalExecutor
from dovetail.runner.forward import ForwardPass
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.small_engine import core_part, generate, model_config
from dovetail.testing.platforms import LadderPlatform, ReferencePlatform, WholeShapes

MODEL = core_part("dovetail.testing.conformance.tiny:TinyModel")
ORACLE = core_part("dovetail.testing.conformance.oracle_decoder:OracleDecoder")
TOTAL, HELD, PER_TOKEN = 10**8, 10**6, 10**4


class CountingPlatform(LadderPlatform):
    """A device whose steps take memory by the token."""

    log: ClassVar[list[tuple[str, Any]]] = []
    room = TOTAL

    def memory(self):
        self.log.append(("memory", None))
        largest = max((size.num_tokens for kind, size in self.log if kind == "run"), default=0)
        return MemoryInfo(
            total=TOTAL, available=TOTAL - HELD, dedicated=True, held=HELD, peak=HELD + largest * PER_TOKEN
        )

    def compile(self, step, bucket):
        checked = super().compile(step, bucket)

        def counted(tensors, metadata):
            self.log.append(("run", bucket))
            if bucket.num_tokens * PER_TOKEN > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return checked(tensors, metadata)

        return counted

    def warmed_up(self):
        self.log.append(("warmed up", None))

    def close(self):
        self.log.append(("closed", None))


class CountingWholePlatform(ReferencePlatform):
    """The same for steps that sample, and for caches that are allocated."""

    compiled_steps: ClassVar[list[tuple[str, Bucket]]] = []
    caches: ClassVar[list[int]] = []

    def shape_policy(self, max_tokens, max_requests):
        return WholeShapes(tokens=[1, max_requests, max_tokens], requests=[1, max_requests])

    def memory(self):
        held = HELD + sum(self.caches)
        return MemoryInfo(total=TOTAL, available=TOTAL - held, dedicated=True, held=held, peak=held + PER_TOKEN)

    def compile(self, step, bucket):
        self.compiled_steps.append((step.__name__, bucket))
        return step


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingPlatform]:
    monkeypatch.setattr(CountingPlatform, "log", [])
    return CountingPlatform


def config_of(folder: Path, **changes: Any):
    hf_config = tiny.WINDOWED
    folder.mkdir(exist_ok=True)
    tiny.write_checkpoint(folder, hf_config)
    config = model_config(MODEL, hf_config, folder, tiny.TinyModel.facts(hf_config), **changes)
    return msgspec.structs.replace(config, platform=core_part(f"{__name__}:CountingPlatform"))


def load(config) -> tuple[LocalExecutor, ExecutorInfo]:
    executor = LocalExecutor(config)
    return executor, executor.load(Progress())


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_platform_hears_when_every_bucket_has_run_of_a_draft_model_too(tmp_path, counting, drafts):
    limits = {"max_num_batched_tokens": 16, "max_num_seqs": 2, "num_speculative_tokens": drafts}
    config = config_of(tmp_path / "model", **limits)
    if drafts:
        draft = config_of(tmp_path / "draft", **limits)
        config = msgspec.structs.replace(config, draft=draft, spec_decoder=ORACLE)
    load(config)
    assert [kind for kind, _ in counting.log].count("warmed up") == 1
    assert counting.log[-1] == ("warmed up", None)
    sized = max(i for i, (kind, _) in enumerate(counting.log) if kind == "memory")
    runs = [bucket for kind, bucket in counting.log[sized:] if kind == "run"]
    assert runs == [*dict.fromkeys(runs)] * (1 + bool(drafts))
    assert len(runs) > 5


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_platform_prepares_for_the_largest_step_before_it_is_told_of_attention(
    tmp_path, counting, drafts, monkeypatch
):
    """What is slow to compile is begun first."""
    monkeypatch.setattr(counting, "prepare", lambda self, run: (self.log.append(("prepare", None)), run()))
    limits = {"max_num_batched_tokens": 48, "max_num_seqs": 5, "num_speculative_tokens": drafts}
    config = config_of(tmp_path / "model", **limits)
    if drafts:
        draft = config_of(tmp_path / "draft", **limits)
        config = msgspec.structs.replace(config, draft=draft, spec_decoder=ORACLE)
    load(config)
    kinds = [kind for kind, _ in counting.log]
    begun = [i for i, kind in enumerate(kinds) if kind == "prepare"]
    assert len(begun) == 3 + bool(drafts)  # operations, the step, the layers of each model
    _, step, *layers = begun
    assert counting.log[step + 1 : layers[0]] == [("run", (48, 5))] * (1 + bool(drafts))


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_largest_step_runs_and_the_cache_gets_the_rest(tmp_path, counting, drafts):
    limits = {"max_num_batched_tokens": 48, "max_num_seqs": 5, "num_speculative_tokens": drafts, "memory_fraction": 0.9}
    config = config_of(tmp_path / "model", **limits)
    if drafts:
        draft = config_of(tmp_path / "draft", **limits)
        config = msgspec.structs.replace(config, draft=draft, spec_decoder=ORACLE)
    _, info = load(config)
    sized = max(i for i, (kind, _) in enumerate(counting.log) if kind == "memory")
    assert [bucket for kind, bucket in counting.log[:sized] if kind == "run"] == [(48, 5)] * (1 + bool(drafts))
    cache = info.num_blocks * info.page_bytes + info.draft_bytes
    budget = 0.9 * TOTAL - HELD - 48 * PER_TOKEN
    assert budget * 0.99 < cache <= budget
    assert (info.draft_bytes > 0) == bool(drafts)


@pytest.mark.parametrize(("drafts", "fraction"), [(0, None), (3, None), (0, 0.9)])
def test_a_whole_step_is_compiled_for_one_size_of_cache_where_that_is_known(tmp_path, monkeypatch, drafts, fraction):
    at_once, allocate = [], kv_memory.allocate
    monkeypatch.setattr(CountingWholePlatform, "compiled_steps", [])
    monkeypatch.setattr(CountingWholePlatform, "caches", [])

    def allocated(specs, groups, backend, blocks):
        made = allocate(specs, groups, backend, blocks)
        size = kv_memory.block_bytes(specs, groups, backend) * blocks
        CountingWholePlatform.caches.append(size)
        at_once.append(len(CountingWholePlatform.caches))
        weakref.finalize(made[0][0], CountingWholePlatform.caches.remove, size)
        return made

    monkeypatch.setattr(kv_memory, "allocate", allocated)
    limits = {"max_num_batched_tokens": 48, "max_num_seqs": 5, "num_speculative_tokens": drafts}
    changes = {**limits, "memory_fraction": fraction, "platform": core_part(f"{__name__}:CountingWholePlatform")}
    config = msgspec.structs.replace(config_of(tmp_path / "model", **limits), **changes)
    if drafts:
        config = msgspec.structs.replace(config, draft=config, spec_decoder=ORACLE)
    executor, info = load(config)
    compiled = CountingWholePlatform.compiled_steps
    assert compiled.count(("_ruled", (48, 5))) == (1 if fraction is None else 2)
    assert compiled.count(("some", (48, 5))) == bool(drafts)
    assert max(at_once) == 1 + bool(drafts)
    assert sum(CountingWholePlatform.caches) == info.num_blocks * info.page_bytes + info.draft_bytes
    full = config.max_num_seqs * kv_memory.blocks_per_request(config, info.groups) + 1
    assert info.num_blocks == full if fraction is None else info.num_blocks > full
    executor.close()


def test_tokens_are_what_they_are_without(tmp_path, counting):
    config = config_of(tmp_path / "model", max_num_seqs=2)
    uncounted = msgspec.structs.replace(config, platform=core_part("dovetail.testing.platforms:LadderPlatform"))
    prompts = [range(3, 3 + count) for count in (5, 9, 2)]
    one, other = (generate(each, prompts, max_tokens=6, temperature=1.0) for each in (config, uncounted))
    assert one == other


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ConfigError("no")], ids=["interrupt", "refusal"])
def test_a_platform_hears_that_loading_ended_early(tmp_path, counting, monkeypatch, fault):
    class Interrupted(Progress):
        def update(self, stage, done, total):
            if stage == "warm-up":
                raise fault

    executor = LocalExecutor(config_of(tmp_path / "model"))
    with pytest.raises(fault if isinstance(fault, type) else type(fault)):
        executor.load(Interrupted())
    assert counting.log[-1] == ("closed", None)
    assert ("warmed up", None) not in counting.log


def test_a_platform_hears_that_the_engine_ends(tmp_path, counting):
    executor, _ = load(config_of(tmp_path / "model"))
    assert ("closed", None) not in counting.log
    executor.close()
    assert counting.log[-1] == ("closed", None)


def test_a_platform_hears_that_the_engine_ends_even_where_a_pass_does_not_close(tmp_path, counting, monkeypatch):
    executor, _ = load(config_of(tmp_path / "model"))
    monkeypatch.setattr(ForwardPass, "close", refuse_to_close)
    with pytest.raises(RuntimeError, match="device is lost"):
        executor.close()
    assert counting.log[-1] == ("closed", None)


def test_what_fails_in_closing_does_not_hide_why_loading_failed(tmp_path, counting, monkeypatch):
    class Refused(Progress):
        def update(self, stage, done, total):
            if stage == "warm-up":
                monkeypatch.setattr(ForwardPass, "close", refuse_to_close)
                raise ConfigError("no")

    with pytest.raises(ConfigError, match="no") as caught:
        LocalExecutor(config_of(tmp_path / "model")).load(Refused())
    assert "device is lost" in caught.value.__notes__[0]


def refuse_to_close(forward):
    raise RuntimeError("device is lost")


def test_a_step_that_does_not_fit_is_refused(tmp_path, counting, monkeypatch):
    monkeypatch.setattr(counting, "room", 40 * PER_TOKEN)
    config = config_of(tmp_path / "model", max_num_batched_tokens=48, max_num_seqs=5)
    with pytest.raises(ConfigError, match=r"A step of 48 tokens of 5 requests does not fit .* --max-num-b"):
        load(config)


def test_a_platform_that_samples_itself_does_so_before_the_first_request(tmp_path, counting, monkeypatch):
    seen = set()

    def sample(logits_SV, params):
        seen.add((len(logits_SV), params.all_greedy, params.any_filter, logits_SV.data_ptr() in raw))
        return reference.sample(logits_SV, params)

    raw = {}  # the tensors, too: their places must not be taken by others
    logits = tiny.TinyModel.logits
    monkeypatch.setattr(counting, "ops", lambda self, dtype: {"sample": sample})
    monkeypatch.setattr(tiny.TinyModel, "logits", lambda *args: raw.setdefault((x := logits(*args)).data_ptr(), x))
    load(config_of(tmp_path / "model", max_num_seqs=4))
    ways = {(greedy, filtered) for _, greedy, filtered, _ in seen}
    assert ways == {(True, False), (False, False), (False, True)}
    assert {rows for rows, *_ in seen} == {1, 2, 3, 4}
    assert {(greedy, unruled) for _, greedy, _, unruled in seen} == set(product((True, False), repeat=2))


def test_weights_that_do_not_fit_are_refused(tmp_path, counting, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = config_of(tmp_path / "model")
    size = sum(weight.nbytes for weight in tiny.weights(tiny.WINDOWED).values())
    monkeypatch.setattr(loaded_model, "load_weights", full)
    monkeypatch.setattr(counting, "memory", lambda self: MemoryInfo(total=TOTAL, available=1024, dedicated=True))
    missing = re.escape(f"take {sizes.size(size)} as they are loaded, and 1.0 KiB are free")
    with pytest.raises(ConfigError, match=f"{missing}.*so {re.escape(sizes.size(size - 1024))} are missing"):
        load(config)


def test_a_closed_executor_leaves_nothing_behind(tmp_path, counting, monkeypatch):
    monkeypatch.setattr(counting, "compile", lambda self, step, bucket: step)
    parts = (tiny.TinyModel, ForwardPass)
    before = [x for x in gc.get_objects() if type(x) in parts]  # of other tests
    executor, _ = load(config_of(tmp_path / "model"))
    gc.collect()
    gc.disable()
    try:
        known = {id(x) for x in before}
        held = [weakref.ref(x) for x in gc.get_objects() if type(x) in parts and id(x) not in known]
        assert len(held) == 2
        executor.close()
        del executor
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
