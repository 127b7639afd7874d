# SPDX-License-Identifier: Apache-2.0
"""Small random Hugging Face checkpoints: quick to run, with sizes that are hard to parallelise."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from lightning_moefold.errors import InputError

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "router_aux_loss_coef": 0.05,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 16, "sliding_window": None},
    # The shared expert is wider than the routed ones, and the kept probabilities are not renormalised.
    "qwen2_moe": {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "intermediate_size": 24,
        "norm_topk_prob": False,
    },
    # Heads are wider together than the hidden size, and the layer in the middle is dense.
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "num_experts": 4,
        "head_dim": 12,
        "moe_intermediate_size": 16,
        "intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}

_STD = 0.3  # for ordinary weights: large enough that no gradient is tiny
_ROUTER_STD = 0.8  # logits several units apart: near-ties in top-k are rare
_NORM_STD = 0.2  # for norm weights, around 1
_OFFSET = 0.2  # added to all embeddings, so that routers see a common direction and prefer some experts


def make_checkpoint(
    path: str | Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a small random checkpoint with ``transformers``.

    A weight depends on the seed, its name and its shape only. Biases are not zero, norm weights not one, and routing
    is moderately skewed.

    Args:
        path: Folder to write; created if absent.
        family: ``"mixtral"``, ``"qwen2_moe"`` or ``"qwen3_moe"``.
        seed: Seed of the weights.
        dtype: Data type of the stored weights (drawn in float32).
        max_shard_size: Largest size of one file, as ``save_pretrained`` takes it.
        **overrides: Fields of the family's ``transformers`` config; ``num_experts`` works for each family.

    Returns:
        The folder.

    Raises:
        ValueError: If the family is unknown, or its config does not have a field.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(family, overrides), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, seed))
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


def _config(family: str, overrides: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if family not in _FAMILIES:
        raise InputError(f"unknown family {family!r}: choose one of {', '.join(_FAMILIES)}")
    if family == "mixtral" and "num_experts" in overrides:
        overrides = {**overrides, "num_local_experts": overrides["num_experts"]}
        del overrides["num_experts"]
    known = AutoConfig.for_model(family)
    if unknown := [name for name in overrides if not hasattr(known, name)]:
        raise InputError(f"{type(known).__name__} has no field {', '.join(unknown)}")
    return AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES[family], **overrides})


def _draw(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Draws the weight of a name in float32, whatever other weights the model has."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + _NORM_STD * noise
    if name.endswith("mlp.gate.weight"):
        return _ROUTER_STD * noise
    if name.endswith("embed_tokens.weight"):
        return _OFFSET + _STD * noise
    return _STD * noise
