# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT makes and writes them, with A and B drawn at random: at B = 0 the gradient of every A is zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lightning_moefold.testing.reference import hf_reference

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = ["mlp.gate.weight"]
DENSE = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_adapter(path: Path, base: Path, *, rank: int = 4, expert_rank: int = 3, seed: int = 0, **fields: Any) -> Path:
    """Writes an adapter of ``base`` with PEFT: by default on all that can have one."""
    model = hf_reference(base, dtype=torch.float32)
    dense = any(n.endswith(".gate_proj.weight") for n, _ in model.named_parameters())
    gate = ["shared_expert_gate"] if any("shared_expert_gate" in n for n, _ in model.named_modules()) else []
    options = {
        "r": rank,
        "lora_alpha": 6,
        "target_modules": ATTENTION + gate,
        "target_parameters": EXPERTS + ROUTER + DENSE * dense,
        "rank_pattern": {"experts.gate_up_proj": expert_rank, "experts.down_proj": expert_rank},
        **fields,
    }
    adapted = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(path)
    return path
