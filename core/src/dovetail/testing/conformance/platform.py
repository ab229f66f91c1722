"""The conformance suite of platforms. Their operations have a suite of their own, :mod:`.ops`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Bucket, MemoryInfo, Platform, PlatformConfig, Probe, ShapePolicy
from dovetail.errors import ConfigError
from dovetail.tensors import leaves
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.small_engine import generate
from dovetail.testing.conformance.subject import installed, registered, selection_of
from dovetail.testing.conformance.suite import TOLERANCE, Suite

MAXIMA = ((64, 8), (37, 5), (2048, 256), (1, 1), (16, 16))
"""Largest steps, ``(tokens, requests)``, that shape policies are asked for."""
PASSING_BYTES = 64 << 20
"""Taken on the device for a moment, where peaks are counted."""
PASSING_IN_STEPS = 4 * PASSING_BYTES
"""The same by a step: more than a compiler finds room for in the chip itself, which is no memory that anyone counts."""
PROMPTS = (3, 40, 1, 25, 60)
"""Lengths of the prompts of the small engine."""


class PlatformSuite(Suite):
    """What every platform does. Where it is not available, all but the probe is skipped with the probe's reason."""

    contract = "platform"
    kind = "platforms"

    def make(self) -> Platform:
        """A platform; skips the test where there is none."""
        self.need_device(self.tested.cls)
        platform: Platform = self.tested.cls(PlatformConfig(num_threads=1))
        return platform

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        """A folder with the tiny model."""
        return tiny.write_checkpoint(tmp_path, tiny.WINDOWED)

    # ---- facts

    def test_probe(self) -> None:
        """platform.1: probe does not raise, and says why not where the platform is unavailable; its facts are text."""
        for _ in range(2):
            probe = self.tested.cls.probe()
            self.check(isinstance(probe, Probe), f"probe(): expected a Probe, got {probe!r}.")
            self.check(probe.available or bool(probe.reason.strip()), "probe(): not available, and gives no reason.")
            self.check(not (probe.available and probe.reason), f"probe(): available, with a reason: {probe.reason!r}.")
            odd = {key: value for key, value in probe.facts.items() if not isinstance(value, str) or not value}
            self.equal(odd, {}, "facts that are no text")

    def test_probe_initialises_nothing(self) -> None:
        """platform.2: probe and default_dtype do not initialise the device, and change no setting of torch."""
        before = self._torch_state()
        self.tested.cls.probe()
        for dtype in (torch.float32, torch.bfloat16):
            self.tested.cls.default_dtype(dtype)
        self.equal(self._torch_state(), before, "state of torch after probe() and default_dtype()")

    def test_device(self) -> None:
        """platform.3: the device is of the manifest's type, and tensors can be made and computed with on it."""
        device = self.make().device
        self.equal(device.type, self.manifest.device_type, "type of the device")
        total = (torch.arange(5, device=device) * 2).sum().cpu().item()
        self.equal(total, 20, "sum of 0, 2, 4, 6, 8 on the device")

    def test_memory(self) -> None:
        """platform.4: memory is counted in whole bytes, and no more is available than there is; a peak is of the time
        since it was last asked for, or of steps where they alone reach the memory."""
        platform = self.make()
        memory = platform.memory()
        self.check(isinstance(memory, MemoryInfo), f"memory(): expected a MemoryInfo, got {memory!r}.")
        counts = (memory.available, memory.total)
        self.check(all(type(count) is int for count in counts), f"memory(): expected whole numbers, got {memory!r}.")
        self.check(0 < memory.available <= memory.total, f"memory(): {memory!r}")
        self.check(memory.available > 1 << 20, f"memory(): {memory.available} cannot hold a model; are they bytes?")
        if memory.peak is None:
            return
        if memory.dedicated and platform.device.type == "cpu":
            self._peak_of_steps(platform, memory)
            return
        torch.zeros(PASSING_BYTES, dtype=torch.uint8, device=platform.device)  # and gone
        seen, later = platform.memory(), platform.memory()
        self.check((seen.peak or 0) - seen.held >= PASSING_BYTES, f"memory() lacks a peak: {seen!r}")
        gone = later.held <= (later.peak or 0) < later.held + PASSING_BYTES
        self.check(gone, f"memory() keeps a peak: {later!r}")

    def _peak_of_steps(self, platform: Platform, before: MemoryInfo) -> None:
        """Memory of the device's own, while torch's device is the host: nothing but steps takes any for a moment. What
        one takes counts for as long as it may run again.
        """
        peak = before.held <= (before.peak or 0) < before.held + PASSING_BYTES
        self.check(peak, f"memory() has a peak before there is a step: {before!r}")
        bucket = platform.shape_policy(16, 4).fit(16, 4)
        with torch.inference_mode():
            step = _step(bucket, 0, platform.device)
            hidden, _ = platform.compile(_passing, bucket)(step, [])
        self.equal(hidden.tolist(), _passing(step, [])[0].tolist(), "outcome of a step that takes memory")
        seen = platform.memory()
        self.check((seen.peak or 0) - seen.held >= PASSING_IN_STEPS, f"memory() lacks the peak of a step: {seen!r}")

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_default_dtype(self, stored: torch.dtype) -> None:
        """platform.5: default_dtype answers every checkpoint's dtype with one of the manifest's."""
        default = str(self.tested.cls.default_dtype(stored)).removeprefix("torch.")
        names = self.manifest.dtypes
        self.check(default in names, f"default_dtype({stored}): expected one of {names}, got {default}.")

    def test_manifest(self) -> None:
        """platform.6: dtypes of the manifest are torch's, and its attention backends exist and run on its devices."""
        for name in self.manifest.dtypes:
            dtype = getattr(torch, name, None)
            self.check(isinstance(dtype, torch.dtype), f"the manifest's dtype {name!r} is none of torch's.")
        self.check(bool(self.manifest.attention), "the manifest names no attention backend.")
        backends = installed().attention
        for name in self.manifest.attention:
            self.check(name in backends, f"no attention backend {name!r} is registered: {backends.names()}.")
            types = backends.get(name).manifest.device_types
            kind = self.manifest.device_type
            self.check(kind in types, f"attention backend {name!r} runs on {types}, not on {kind!r}.")

    def test_constructions(self, dtype: torch.dtype) -> None:
        """platform.7: a platform can be made twice in a process, and both work side by side."""
        first, second = self.make(), self.make()
        self.equal(second.device, first.device, "device of the second platform")
        for platform in (first, second, first):
            ops = OpTable.resolve(platform.ops(dtype), self.manifest.name)
            x = torch.eye(8, dtype=dtype, device=platform.device)
            out = ops.linear(x, ops.linear_pack(3 * x))
            self.close(out, 3 * torch.eye(8), "linear of one of two platforms", dtype=dtype)

    def test_bad_config(self) -> None:
        """platform.8: a number of threads that cannot be honoured is refused with a ConfigError, and nothing else."""
        self.make()
        try:
            self.tested.cls(PlatformConfig(num_threads=0))
        except ConfigError as error:
            self.check("0" in str(error), f"num_threads 0 is refused without naming it: {error}")
        except Exception as error:  # noqa: BLE001  any other exception is the finding
            self.fail(f"num_threads 0: expected a ConfigError or a platform, got {type(error).__name__}: {error}")

    def test_ops(self) -> None:
        """platform.9: the operations given are those declared: none that the op table lacks, none undeclared, and
        together, over the manifest's dtypes, all that are declared.
        """
        platform = self.make()
        given: set[str] = set()
        for name in self.manifest.dtypes:
            ops = platform.ops(getattr(torch, name))
            self.equal(sorted(set(ops) - OpTable.names()), [], f"unknown operations for {name}")
            self.equal(sorted(set(ops) - self.manifest.ops), [], f"operations for {name} that the manifest leaves out")
            self.equal([key for key in ops if not callable(ops[key])], [], f"operations for {name} that are no calls")
            given |= set(ops)
        self.equal(sorted(self.manifest.ops - given), [], "operations that are declared and given for no dtype")

    # ---- shapes

    @pytest.mark.parametrize("maxima", MAXIMA, ids=str)
    def test_fit(self, maxima: tuple[int, int]) -> None:
        """platform.10: every step up to the largest fits a bucket that is no smaller, and a bucket fits itself."""
        policy = self.make().shape_policy(*maxima)
        for size, bucket in self._fits(policy, maxima):
            self.check(isinstance(bucket, Bucket), f"fit{size} of {maxima}: expected a Bucket, got {bucket!r}.")
            fits = bucket.num_tokens >= size[0] and bucket.num_requests >= size[1]
            self.check(fits, f"fit{size} of {maxima} is {tuple(bucket)}, which is smaller.")
            self.equal(policy.fit(*bucket), bucket, f"fit of the bucket that fit{size} of {maxima} gave")

    @pytest.mark.parametrize("maxima", MAXIMA, ids=str)
    def test_fit_grows(self, maxima: tuple[int, int]) -> None:
        """platform.11: a larger step never fits a smaller bucket."""
        policy = self.make().shape_policy(*maxima)
        fits = dict(self._fits(policy, maxima))
        for (tokens, requests), bucket in fits.items():
            for bigger in ((tokens + 1, requests), (tokens, requests + 1)):
                grown = fits.get(bigger)
                if grown is not None:
                    grew = grown.num_tokens >= bucket.num_tokens and grown.num_requests >= bucket.num_requests
                    what = f"fit{(tokens, requests)} of {maxima} is {tuple(bucket)}, and fit{bigger} {tuple(grown)}"
                    self.check(grew, f"{what}, which is smaller.")

    @pytest.mark.parametrize("maxima", MAXIMA, ids=str)
    def test_ladder(self, maxima: tuple[int, int]) -> None:
        """platform.12: the ladder is not empty, holds each bucket once, largest first, and only buckets that steps fit;
        with static shapes it holds every bucket that any step fits, so that serving never compiles.
        """
        policy = self.make().shape_policy(*maxima)
        ladder = list(policy.ladder())
        self.check(bool(ladder), f"the ladder for {maxima} is empty: nothing would prove that the model runs.")
        self.equal(ladder, sorted(set(ladder), reverse=True), f"order of the ladder for {maxima}")
        for bucket in ladder:
            self.equal(policy.fit(*bucket), bucket, f"fit of {tuple(bucket)}, which is on the ladder for {maxima},")
        if policy.static:
            for size, bucket in self._fits(policy, maxima):
                self.check(bucket in ladder, f"fit{size} of {maxima} is {tuple(bucket)}, which is not on the ladder.")

    # ---- compiled steps

    def test_compile(self, dtype: torch.dtype) -> None:
        """platform.13: a compiled step gives the results of the plain one, for new inputs at each call."""
        platform = self.make()
        policy = platform.shape_policy(16, 4)
        table = torch.arange(32 * 6, dtype=torch.float32).reshape(32, 6).sin().to(dtype).to(platform.device)

        def step(tensors: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
            hidden = table[tensors.token_ids_T] + tensors.positions_T.unsqueeze(1).to(dtype)
            return hidden, hidden[tensors.logits_rows_S] @ table.t()

        with torch.inference_mode():
            compiled = {bucket: platform.compile(step, bucket) for bucket in (policy.fit(16, 4), policy.fit(1, 1))}
            for seed in range(3):
                for bucket, run in compiled.items():
                    tensors = _step(bucket, seed, platform.device)
                    outs = run(tensors, [])
                    for name, out, plain in zip(("hidden states", "logits"), outs, step(tensors, []), strict=True):
                        what = f"{name} of call {seed} at {tuple(bucket)}"
                        self.close(out.clone(), plain.cpu(), what, dtype=dtype)

    def test_adopt(self) -> None:
        """platform.19: compiled steps read adopted tables as they were, and what one changes there the next one sees,
        of whatever bucket; a table that is found twice stays one.
        """
        platform = self.make()
        policy = platform.shape_policy(16, 4)
        plain = _Adopted.of(torch.device("cpu"))
        with torch.inference_mode():
            adopted = platform.adopt(_Adopted.of(platform.device))
            self.equal(type(adopted), _Adopted, "type of an adopted container")
            buckets = (policy.fit(16, 4), policy.fit(1, 1))
            compiled = {bucket: platform.compile(adopted.step, bucket) for bucket in buckets}
            for bucket, run in compiled.items():  # what comes first may run more than once, and so must change nothing
                first = _step(bucket, 0, platform.device)
                run(replace(first, positions_T=torch.zeros_like(first.positions_T)), [])
            for seed in range(3):
                for bucket, run in compiled.items():
                    outs = run(_step(bucket, seed, platform.device), [])
                    right = plain.step(_step(bucket, seed, torch.device("cpu")), [])
                    for name, out, expected in zip(("hidden states", "logits"), outs, right, strict=True):
                        what = f"{name} over adopted tables, call {seed} at {tuple(bucket)}"
                        self.close(out.clone(), expected, what, dtype=torch.float32)

    def test_transfers(self) -> None:
        """platform.17: uploads are on the device as they were on the host; downloads hold what the work queued before
        them left, also when they are read after later work and later downloads.
        """
        platform = self.make()
        hosts = [
            torch.arange(7, dtype=torch.int64),
            torch.linspace(-1, 1, 12).reshape(3, 4).t(),
            torch.tensor([True, False]),
            torch.empty(0, 3, dtype=torch.int32),
            torch.tensor(2.5),
        ]
        with torch.inference_mode():
            on_device = [platform.upload(host) for host in hosts]
            reads = []
            for factor in (2, 3):
                scaled = [tensor * factor if tensor.dtype != torch.bool else ~tensor for tensor in on_device]
                reads.append(platform.download(scaled))
                del scaled
                torch.ones(1 << 20, device=platform.device).cumsum(0)
            for factor, read in zip((2, 3), reads, strict=True):
                for host, got in zip(hosts, read(), strict=True):
                    what = f"{host.dtype} of shape {tuple(host.shape)}, downloaded times {factor}"
                    self.equal((got.device.type, got.dtype), ("cpu", host.dtype), f"device and dtype of {what}")
                    right = host * factor if host.dtype != torch.bool else ~host
                    self.equal(got.tolist(), right.tolist(), what)
        for host, tensor in zip(hosts, on_device, strict=True):
            what = f"device, dtype and shape of an uploaded {host.dtype} of shape {tuple(host.shape)}"
            self.equal(
                (tensor.device.type, tensor.dtype, tuple(tensor.shape)),
                (platform.device.type, host.dtype, tuple(host.shape)),
                what,
            )

    def test_staging(self) -> None:
        """platform.18: memory to read files into is the host's, as large as asked, and no one else's; what is copied
        from it is on the device as it was.
        """
        platform = self.make()
        pieces = [platform.staging(nbytes) for nbytes in (1, 4096, 100_000, 100_000)]
        for nbytes, piece in zip((1, 4096, 100_000, 100_000), pieces, strict=True):
            kind = (piece.device.type, piece.dtype, tuple(piece.shape), piece.is_contiguous())
            self.equal(kind, ("cpu", torch.uint8, (nbytes,), True), f"device, dtype, shape of staging({nbytes})")
        content = [torch.arange(len(piece)).mul(7 + i).to(torch.uint8) for i, piece in enumerate(pieces)]
        for piece, right in zip(pieces, content, strict=True):
            piece.numpy()[:] = right.numpy()
        copies = [piece.to(platform.device, non_blocking=piece.is_pinned(), copy=True) for piece in pieces]
        for i, (copy, right) in enumerate(zip(copies, content, strict=True)):
            self.check(torch.equal(copy.cpu(), right), f"bytes of piece {i} of {len(right)} changed on the way.")

    def test_engine(self, dtype: torch.dtype, checkpoint: Path) -> None:
        """platform.14: an engine on the platform, with each of its attention backends, generates the tokens of a dense
        float64 model, in a mix of prompt chunks and decodes.
        """
        self.make()
        prompts = [[(7 * i + 5 * length) % tiny.VOCAB_SIZE for i in range(length)] for length in PROMPTS]
        backends = [*self._backends(dtype)]
        if not backends:
            self.lacks(f"attention with sliding_window in {dtype}")
        for backend in backends:
            outputs = generate(self._config(checkpoint, dtype, backend), prompts, max_tokens=12)
            for prompt, output in zip(prompts, outputs, strict=True):
                self.equal(len(output), 12, f"tokens after a prompt of {len(prompt)}, attention {backend!r}")
                self._plausible(prompt, output, dtype, f"attention {backend!r}")

    def test_seeded_engine(self, checkpoint: Path) -> None:
        """platform.15: a sampled request gets the same tokens alone as in a batch."""
        self.make()
        dtype = torch.float32 if "float32" in self.manifest.dtypes else getattr(torch, self.manifest.dtypes[0])
        backend = next(self._backends(dtype))
        prompts = [[11 * i % tiny.VOCAB_SIZE for i in range(length)] for length in (20, 33, 5)]
        sampling = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 10}
        together = generate(self._config(checkpoint, dtype, backend), prompts, **sampling)
        alone = generate(self._config(checkpoint, dtype, backend), prompts[:1], **sampling)
        self.equal(alone[0], together[0], "tokens of a seeded request alone, and in a batch of 3")

    def test_compiles_each_bucket_once(self, checkpoint: Path) -> None:
        """platform.16: an engine compiles each bucket of a step once, and with static shapes none after warm-up; every
        step of a bucket then has the same shapes.
        """
        self.make()
        watched = _watched(self.tested.cls)
        dtype = getattr(torch, self.manifest.dtypes[0])
        selection = selection_of(watched, self.manifest.name)
        config = self._config(checkpoint, dtype, next(self._backends(dtype)), selection)
        generate(config, [[1] * length for length in (50, 9, 1, 30, 20, 40, 3)], max_tokens=6)
        steps = watched.seen_steps
        twice = {bucket for step, bucket in steps if steps.count((step, bucket)) > 1}
        self.equal(twice, set(), "buckets compiled twice")
        policy = self.make().shape_policy(config.max_num_batched_tokens, config.max_num_seqs)
        if policy.static:
            buckets = sorted({bucket for _, bucket in steps})
            self.equal(buckets, sorted(policy.ladder()), "buckets compiled by warm-up and 7 requests")
            varied = {tuple(bucket): shapes for (_, bucket), shapes in watched.seen_shapes.items() if len(shapes) > 1}
            self.equal(varied, {}, "buckets whose steps differ in shape")

    # ---- shared steps

    def _torch_state(self) -> Mapping[str, Any]:
        module = getattr(torch, self.manifest.device_type, None)
        initialised = getattr(module, "is_initialized", lambda: False)()
        return {
            "initialised": initialised,
            "threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
        }

    def _fits(self, policy: ShapePolicy, maxima: tuple[int, int]) -> Iterator[tuple[tuple[int, int], Bucket]]:
        most_tokens, most_requests = maxima
        for requests in _sizes(most_requests):
            for tokens in _sizes(most_tokens):
                if tokens >= requests:
                    yield (tokens, requests), policy.fit(tokens, requests)

    def _backends(self, dtype: torch.dtype) -> Iterator[str]:
        """The platform's attention backends that accept ``dtype`` and a sliding window."""
        for name in self.manifest.attention:
            manifest = registered(name).find("attention").manifest
            if str(dtype).removeprefix("torch.") in manifest.dtypes and manifest.sliding_window:
                yield name

    def _config(self, checkpoint: Path, dtype: torch.dtype, backend: str, platform: Any = None) -> Any:
        attention = registered(backend).find("attention")
        sizes = attention.manifest.block_sizes
        return tiny.tiny_config(
            checkpoint,
            platform=platform or self.tested.selection,
            attention=attention.selection,
            hf_config=tiny.WINDOWED,
            dtype=str(dtype).removeprefix("torch."),
            kv_dtype=str(dtype).removeprefix("torch."),
            block_size=16 if not sizes or 16 in sizes else min(sizes),
            max_num_batched_tokens=32,
        )

    def _plausible(self, prompt: Sequence[int], output: Sequence[int], dtype: torch.dtype, what: str) -> None:
        """Each token must lead in float64 logits, up to what rounding in ``dtype`` explains."""
        __tracebackhide__ = True
        logits = tiny.dense_logits([*prompt, *output], tiny.WINDOWED)[len(prompt) - 1 : -1]
        for i, (row, token) in enumerate(zip(logits, output, strict=True)):
            behind = float(row.max() - row[token]) / float(row.abs().max())
            if behind > 4 * TOLERANCE[dtype]:
                self.fail(
                    f"token {i} after a prompt of {len(prompt)}, {what}, {dtype}: expected {int(row.argmax())}, got "
                    f"{token}, whose float64 logit is {behind:.2%} of the largest behind."
                )


@dataclass(frozen=True)
class _Adopted:
    """A table that steps read, and one that they change, which they reach in two ways."""

    table_VD: Tensor
    counts_V: Tensor
    more: dict[str, Tensor]

    @classmethod
    def of(cls, device: torch.device) -> _Adopted:
        table = torch.arange(32 * 6, dtype=torch.float32).reshape(32, 6).sin().to(device)
        counts = torch.zeros(32, dtype=torch.int32, device=device)
        return cls(table, counts, {"counts": counts})

    def step(self, tensors: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Count each token as often as its position says, and give the counts so far with its row of the table."""
        self.counts_V.index_add_(0, tensors.token_ids_T, tensors.positions_T.to(torch.int32))
        hidden = self.table_VD[tensors.token_ids_T]
        logits = hidden[tensors.logits_rows_S] @ self.table_VD.t()
        return hidden, logits + self.more["counts"]


def _passing(tensors: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """A step with a table of its own, which no compiler leaves out: it is written where tokens say, and read there."""
    ids_T, counts_T = (part.to(torch.int32) for part in (tensors.token_ids_T, tensors.positions_T))
    table_P = counts_T.new_zeros(PASSING_IN_STEPS // counts_T.element_size()).index_add(0, ids_T, counts_T)
    return table_P[ids_T], table_P[tensors.logits_rows_S]


def _sizes(most: int) -> list[int]:
    """All sizes, or some where there are many: around powers of two, and the largest."""
    some = {1, most, most - 1, *(2**n + d for n in range(most.bit_length()) for d in (-1, 0, 1))}
    return sorted(size for size in (some if most > 40 else range(1, most + 1)) if 1 <= size <= most)


def _step(bucket: Bucket, seed: int, device: torch.device) -> StepTensors:
    """Tables of a step that fills the bucket."""
    tokens, requests = bucket
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(requests + 1).clamp(max=tokens)
    starts[-1] = tokens
    return StepTensors(
        token_ids_T=torch.randint(0, 32, (tokens,), generator=generator).to(device),
        positions_T=torch.randint(0, 4, (tokens,), generator=generator).to(device),
        query_start_R1=starts.to(torch.int32).to(device),
        seq_lens_R=starts.diff().to(torch.int32).to(device),
        block_tables=[torch.zeros(requests, 2, dtype=torch.int32, device=device)],
        slot_mapping=[torch.zeros(tokens, dtype=torch.int64, device=device)],
        logits_rows_S=torch.randint(0, tokens, (requests,), generator=generator).to(device),
        max_query_len=tokens,
        max_seq_len=tokens,
    )


def _watched(cls: Any) -> Any:
    """A subclass that notes which buckets are compiled, and the shapes of their steps."""

    class Watched(cls):
        seen_steps: list[tuple[Any, Bucket]] = []  # noqa: RUF012  one list for the class is meant: it is made for one test
        seen_shapes: dict[tuple[Any, Bucket], set[Any]] = {}  # noqa: RUF012

        def compile(self, step: Any, bucket: Bucket) -> Any:
            self.seen_steps.append((step, bucket))
            run = super().compile(step, bucket)

            def noted(tensors: Any, *others: Any) -> Any:
                shapes = tuple(leaf.shape for leaf in leaves((tensors, others[1:])) if isinstance(leaf, Tensor))
                self.seen_shapes.setdefault((step, bucket), set()).add(shapes)
                return run(tensors, *others)

            return noted

    return Watched
