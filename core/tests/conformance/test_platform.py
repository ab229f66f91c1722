"""Our own platforms, in the public form."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.contracts.platform import MemoryInfo
from dovetail.plugins.manifest import PlatformManifest
from dovetail.testing.conformance import PlatformSuite, registered, unregistered
from dovetail.testing.platforms import GIB, LadderPlatform, ReferencePlatform, WholePlatform


def manifest(name: str) -> PlatformManifest:
    return PlatformManifest(
        name=name, summary="For tests.", device_type="cpu", dtypes=("float32",), attention=("reference", "blocked")
    )


class Largest(TorchDispatchMode):
    """How large the largest tensor is that anything makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, out.nbytes if isinstance(out, torch.Tensor) else 0)
        return out


class MemoryOfItsOwn(ReferencePlatform):
    """As of a chip that torch does not know: steps alone take any, and those that were compiled may take it again."""

    step_bytes = 0

    def memory(self):
        return MemoryInfo(total=4 * GIB, available=3 * GIB, dedicated=True, held=GIB, peak=GIB + self.step_bytes)

    def compile(self, step, bucket):
        def counted(*args):
            with Largest() as largest:
                outputs = step(*args)
            self.step_bytes = max(self.step_bytes, largest.nbytes)
            return outputs

        return counted


class TestCpu(PlatformSuite):
    subject = registered("cpu")


class TestReference(PlatformSuite):
    subject = unregistered(ReferencePlatform, manifest("reference-ops"))


class TestLadder(PlatformSuite):
    subject = unregistered(LadderPlatform, manifest("ladder"))


class TestWhole(PlatformSuite):
    subject = unregistered(WholePlatform, manifest("whole"))


class TestMemoryOfItsOwn(PlatformSuite):
    subject = unregistered(MemoryOfItsOwn, manifest("apart"))
