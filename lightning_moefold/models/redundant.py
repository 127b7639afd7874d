# SPDX-License-Identifier: Apache-2.0
"""Checks redundant tensors of a checkpoint against the tensors or configuration fields that they repeat.

Legend: V vocabulary, D hidden size, h half a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.errors import CheckpointError
from lightning_moefold.models.config import MoEConfig

_ROWS = 8192  # number of rows compared at a time


def compare_redundant(checkpoint: HFCheckpoint, config: MoEConfig, rotary: Iterable[str]) -> None:
    """Compares a tied head with the embedding, and stored rotary frequencies with the configuration's.

    Args:
        checkpoint: The checkpoint; its shapes have been checked.
        config: Configuration of the model.
        rotary: Names of the stored frequencies.

    Raises:
        CheckpointError: If they differ.
    """
    if (
        config.tie_word_embeddings
        and "lm_head.weight" in checkpoint.tensors
        and not _head_is_embedding(checkpoint, config)
    ):
        raise CheckpointError(
            f"{checkpoint.path} holds a head of its own ('lm_head.weight' is not the embedding), but its configuration says "
            "tie_word_embeddings=True; set tie_word_embeddings=False to train both, as transformers reads it, or delete the "
            "head from the file."
        )
    for name in rotary:
        stored_h = checkpoint.read(name, ())
        exponent_h = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        frequency_h = 1.0 / config.rope_theta**exponent_h
        close = any(
            torch.allclose(stored_h.double(), frequency_h / factor, rtol=4 * torch.finfo(stored_h.dtype).eps, atol=0.0)
            for factor in (1.0, config.rope_scaling_factor)
        )
        if not close:
            raise CheckpointError(
                f"{checkpoint.path} holds {name!r}, whose frequencies are not those of rope_theta={config.rope_theta} in its "
                "configuration; correct the field, or delete the tensor from the file."
            )


def _head_is_embedding(checkpoint: HFCheckpoint, config: MoEConfig) -> bool:
    for start in range(0, config.vocab_size, _ROWS):
        rows = (slice(start, min(start + _ROWS, config.vocab_size)), slice(0, config.hidden_size))
        head_VD, embedding_VD = (checkpoint.read(f"{n}.weight", rows) for n in ("lm_head", "model.embed_tokens"))
        if not bool((head_VD == embedding_VD).all()):
            return False
    return True
