"""Every kernel against the reference operation, in processes of their own: whether Triton compiles or interprets is
decided when it is imported, for a whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parent / "kernels"
MODULES = sorted(path.name for path in KERNELS.glob("check_*.py"))
# numpy, which interprets, warns where a chip gives infinities
QUIET = ("-W", "ignore::RuntimeWarning")


def outcome(module, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUIET, str(KERNELS / module)]
    path = os.pathsep.join([str(KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module):
    result = outcome(module, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout


def test_prompts_compile_for_hopper():
    result = subprocess.run(
        [sys.executable, str(KERNELS / "compile_prompts.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    assert "compiled" in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="lacks a GPU")
@pytest.mark.parametrize("module", MODULES)
def test_compiled(module):
    result = outcome(module)
    assert result.returncode == 0, result.stdout
