# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a run as a Hugging Face directory, by one process and without the fold.

A checkpoint holds tensors under global names and the configuration of each model in it, so it says by itself what it is.
Tensors are read and written file by file: no more than one output file's are in memory at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.checkpoint import OutputTensor, write_hf_checkpoint
from lightning_moefold.checkpoint.sharded import MODELS, StoredTensors, load_meta, tensors_of
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.models.names import bias_entries, parameter_entries

DTYPES = ("float32", "bfloat16", "float16", "float64")


def export(checkpoint: str | Path, output: str | Path, model: Path | None = None, dtype: str | None = None) -> None:
    """Writes the model of a checkpoint as ``transformers`` loads it.

    Args:
        checkpoint: Directory that a Trainer with this strategy has saved, here or in a store.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        model: Directory of which everything but the weights is copied along. By default that of the model with which
            training began, and the tokenizer of the data, where :class:`~.recipes.TextData` has said which it is.
        dtype: On disk; that of the model from which training began by default.

    Raises:
        CheckpointError: If the checkpoint is damaged, or holds no model or several.
        OSError: If ``output`` cannot be written.
    """
    meta = load_meta(checkpoint)
    name, described = _only_model(checkpoint, meta.get(MODELS, {}))
    config = MoEConfig.from_hf(described["config"])
    stored = StoredTensors(tensors_of(checkpoint, meta))
    tensors, whole = {}, {}
    for parameter, entry in (parameter_entries(config) | bias_entries(config)).items():
        full = f"model.{name}.{parameter}"
        if full not in stored.items or tuple(stored.items[full].size) != tuple(entry.shape):
            raise CheckpointError(f"{checkpoint} has no {full!r} of shape {list(entry.shape)}; it is damaged.")
        kind = getattr(torch, dtype or described["dtypes"][parameter])
        owners = ((0, Box((0,) * len(entry.shape), tuple(entry.shape))),)
        tensors[parameter] = OutputTensor(entry.shape, kind, entry.sources, entry.stacked, owners)
        whole[parameter] = full

    def piece(parameter: str) -> Tensor:
        return stored.read(whole[parameter])

    written: dict[str, Any] = written_config(config)
    if dtype is not None:
        written = {k: v for k, v in written.items() if k != "torch_dtype"} | {"dtype": dtype}
    origin = model or (Path(described["path"]) if described["path"] else None)
    output = local_path(output, "output")
    if model is not None and not model.is_dir():
        raise CheckpointError(f"{model} is no directory; give the one with the tokenizer.")
    tokenizer = Path(described["tokenizer"]) if model is None and described.get("tokenizer") else None
    write_hf_checkpoint(output, written, tensors, piece, SINGLE, side_files_from=origin, tokenizer_from=tokenizer)


def _only_model(checkpoint: str | Path, models: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if len(models) != 1:
        what = f"holds the models {', '.join(models)}" if models else "holds no model with MoE layers"
        raise CheckpointError(f"{checkpoint} {what}; moefold export needs a checkpoint with exactly one.")
    return next(iter(models.items()))
