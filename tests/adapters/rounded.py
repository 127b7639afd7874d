# SPDX-License-Identifier: Apache-2.0
"""What a base in fewer bytes computes with, written down without the package and without bitsandbytes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: The sixteen numbers of NF4 (arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
#: Names of what is rounded in a checkpoint: attention, dense layers, shared experts, experts.
ROUNDED = re.compile(r"(_proj|\.w[123])\.weight$|experts\.(gate_up|down)_proj$")


def round_weight(weight: Tensor, kind: str) -> Tensor:
    """Every 64 numbers of a row to the nearest that their largest magnitude allows."""
    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    if kind == "int8":
        rounded = (blocks / (largest / 127)).round() * (largest / 127)
    else:
        middles = (NF4[1:] + NF4[:-1]) / 2
        rounded = NF4[torch.bucketize(blocks * (1 / largest), middles)] * largest
    return rounded.view(weight.shape)


def round_checkpoint(base: Path, output: Path, kind: str) -> Path:
    """Writes a checkpoint with rounded weights."""
    if output.exists():
        return output
    shutil.copytree(base, output)
    assert json.loads((base / "config.json").read_text())["hidden_size"] % 64 == 0
    for file in output.glob("*.safetensors"):
        tensors = load_file(file)
        rounded = {n: round_weight(t, kind) if ROUNDED.search(n) else t for n, t in tensors.items()}
        assert any(not torch.equal(rounded[n], t) for n, t in tensors.items())
        save_file(rounded, file, metadata={"format": "pt"})
    return output
