"""Loading must not hold a checkpoint twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MEASURE = """
import json, sys
from pathlib import Path
import torch
from dovetail.contracts.executor import Progress
from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.layers.linear import Unquantized
from dovetail.runner.loader import load_weights
from dovetail_models.llama import Llama

def memory(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

class Copies(Progress):
    last = (0, 0)
    def update(self, stage, done, total):
        assert stage == "load" and self.last[0] < done <= total
        self.last = (done, total)

torch.set_num_threads(1)
torch.ones(4 << 20).to(torch.bfloat16).float().clone()
path = Path(sys.argv[1])
config = json.loads((path / "config.json").read_text())
# Packing makes a copy, as it does on platforms that have packed forms.
ops = OpTable(linear_pack=lambda weight_OI: weight_OI.clone())
context = ModelContext(ops=ops, dtype=torch.bfloat16, device=torch.device("cpu"), quant=Unquantized(), max_model_len=64)
before = memory("VmRSS")
progress = Copies()
model = Llama(config, context)
load_weights(model, path, progress)
assert progress.last[0] == progress.last[1] > 0
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


def checkpoint(path: Path, dtype: torch.dtype) -> int:
    """A checkpoint of about 100 M parameters; returns how many it has."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 16000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (16000, 768), "lm_head.weight": (16000, 768), "model.norm.weight": (768,)}
    for i in range(12):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (768,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (768, 768) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (256, 768) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (2048, 768) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (768, 2048)}
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["bfloat16", "float32"]
)
def test_peak_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """At most 1.15 × the weights, whatever dtype they are stored in, though every layer is packed by copying it."""
    weights = checkpoint(tmp_path, dtype) * torch.bfloat16.itemsize
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, final = (int(word) for word in run.stdout.split())
    assert final > 0.7 * weights  # the model is held; the system may have reclaimed pages of libraries meanwhile
    assert peak < 1.15 * weights, f"peak {peak / weights:.2f} × the weights, final {final / weights:.2f}"
