"""Transfers: copies between host and device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Transfers:
    """Copies through pinned memory: up in the order of the work itself, down beside it on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, host: Tensor) -> Tensor:
        """See :meth:`dovetail.contracts.platform.Platform.upload`."""
        return host.pin_memory().to(self._device, non_blocking=True)

    def download(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """See :meth:`dovetail.contracts.platform.Platform.download`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            done = self._stream.record_event()

        def read(held: Sequence[Tensor] = tensors) -> Sequence[Tensor]:  # memory that is copied from must stay theirs
            done.synchronize()
            return copies

        return read
