# SPDX-License-Identifier: Apache-2.0
"""Awkward shapes of models, in the words of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_moefold.testing import make_checkpoint
from lightning_moefold.testing.checkpoints import _COMMON, _FAMILIES

#: Each is awkward in several ways that do not hide each other.
SHAPES: dict[str, dict[str, Any]] = {
    "28 heads": {"num_experts": 8, "hidden_size": 56, "num_attention_heads": 28, "num_key_value_heads": 4},
    "12 experts": {"num_experts": 12, "num_experts_per_tok": 4, "moe_ffn": 8, "vocab_size": 97},
    "6 experts, tied": {
        "num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "dense layers": {"num_experts": 8, "vocab_size": 97, "dense": True, "pad_token_id": 3},
}  # fmt: skip


def shape_fields(family: str, shape: str) -> dict[str, Any]:
    """Config fields of a shape, in the words of a family."""
    fields = dict(SHAPES[shape])
    width = fields.pop("moe_ffn", 16)
    fields["intermediate_size" if family == "mixtral" else "moe_intermediate_size"] = width
    dense = fields.pop("dense", False)
    if family == "mixtral":
        return fields
    fields["intermediate_size"] = 24
    if family == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = 24
    if dense:
        fields |= {"decoder_sparse_step": 2, "mlp_only_layers": []}
    elif family == "qwen3_moe":
        fields["mlp_only_layers"] = [1]
    return fields


def hf_config(family: str, shape: str, **overrides: Any) -> dict[str, Any]:
    """What stands in ``config.json``, as far as a fold's legality goes."""
    fields = {**shape_fields(family, shape), **overrides}
    if family == "mixtral":
        fields["num_local_experts"] = fields.pop("num_experts")
    return {"model_type": family, **_COMMON, **_FAMILIES[family], **fields}


def checkpoint(folder: Path, family: str, shape: str, layers: int | None = None) -> Path:
    """The checkpoint of a family and shape, made once; ``layers`` replaces its number of layers."""
    path = folder / f"{family}-{shape.replace('/', ' ')}-{layers}"
    if not path.exists():
        more = {} if layers is None else {"num_hidden_layers": layers}
        make_checkpoint(path, family, **{**shape_fields(family, shape), **more})
    return path
