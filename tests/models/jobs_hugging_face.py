# SPDX-License-Identifier: Apache-2.0
"""Jobs that read and write Hugging Face directories under a fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import Settings, Sharding, parallelize
from lightning_moefold.testing.pieces import owned_pieces


def parallel(fold: str, make: Any, **sharding: Any) -> MoECausalLM:
    """A model made without storage, then parallelised, as the strategy does it."""
    with deferred_weights():
        model = make()
    parallelize(
        model,
        FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu"),
        Settings(Sharding(**sharding)),
        torch.device("cpu"),
    )
    return model


def round_trip(path: str, folds: list[str], folder: str, options: dict[str, Any]) -> None:
    for number, fold in enumerate(folds):
        model = parallel(fold, lambda: MoECausalLM.from_pretrained(path))
        model.save_pretrained(Path(folder, str(number)), **options)


def seeded(config: dict[str, Any], folds: list[str], seed: int) -> list[dict[str, Any]]:
    return [owned_pieces(parallel(fold, lambda: MoECausalLM.from_config(config, seed=seed))) for fold in folds]


def logits(path: str, fold: str, batch: dict[str, Tensor], overrides: dict[str, Any]) -> Tensor:
    """Whole logits, in float64."""
    torch.set_default_dtype(torch.float64)
    model = parallel(fold, lambda: MoECausalLM.from_pretrained(path, **overrides))
    with torch.no_grad():
        return model(**batch, gather_logits=True).logits
