# SPDX-License-Identifier: Apache-2.0
"""Exports a run's checkpoint as a Hugging Face directory, in one process and without the fold.

A checkpoint holds tensors under global names and the configuration of each model in it, so it says by itself what it is.
Tensors are read and written file by file: no more than one output file's are in memory at a time. That of a run with an adapter
names its base, from which the rest is read, and the adapter is merged into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.adapters.adapter import merges_of
from lightning_moefold.adapters.attach import is_adapter
from lightning_moefold.adapters.config import LoRA
from lightning_moefold.checkpoint import HFCheckpoint, OutputTensor, write_hf_checkpoint
from lightning_moefold.checkpoint.sharded import MODELS, StoredTensors, load_meta
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.errors import CheckpointError
from lightning_moefold.layout import Box
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.models.names import bias_entries, parameter_entries
from lightning_moefold.models.weights import CheckpointWeights, SeededWeights, WeightSource, read_whole

DTYPES = ("float32", "bfloat16", "float16", "float64")


def export(checkpoint: str | Path, output: str | Path, model: Path | None = None, dtype: str | None = None) -> bool:
    """Writes the model of a checkpoint as ``transformers`` loads it.

    Args:
        checkpoint: Directory saved by a Trainer with this strategy, local or in a store.
        output: Directory to create. A directory that holds a model is replaced; one that holds other files is refused.
        model: Directory whose files other than weights are copied. By default the directory that training started from,
            and the tokenizer of the data if it comes from :class:`~.recipes.TextData`.
        dtype: Data type on disk; by default that of the model that training started from.

    Returns:
        Whether an adapter is merged into the weights.

    Raises:
        CheckpointError: If the checkpoint is damaged, or holds no model or several; or if the base of its adapter is not where
            it was, nor at ``model``.
        OSError: If ``output`` holds other files.
    """
    meta = load_meta(checkpoint)
    name, described = _only_model(checkpoint, meta.get(MODELS, {}))
    config = MoEConfig.from_hf(described["config"])
    stored = StoredTensors(checkpoint, meta)
    adapter = described.get("adapter")
    base = None if adapter is None else _base(checkpoint, adapter, config, model)
    prefix, tensors = f"model.{name}.", {}
    for parameter, entry in (parameter_entries(config) | bias_entries(config)).items():
        full = prefix + parameter
        missing = full not in stored.items
        if missing and base is None or not missing and tuple(stored.items[full].size) != tuple(entry.shape):
            raise CheckpointError(f"{checkpoint} has no {full!r} of shape {list(entry.shape)}; it is damaged.")
        kind = getattr(torch, dtype or described["dtypes"][parameter])
        owners = ((0, (Box.whole(entry.shape),)),)
        tensors[parameter] = OutputTensor(entry.shape, kind, entry.sources, entry.stacked, owners)

    parts = _adapter_tensors(stored, prefix) if adapter is not None else {}

    def piece(parameter: str) -> Tensor:
        if prefix + parameter in stored.items:
            return stored.read(prefix + parameter)
        assert base is not None
        kind = base.dtype(parameter) or torch.float32
        return read_whole(base, parameter, tensors[parameter].shape, kind)

    def dtype_of(parameter: str) -> torch.dtype:
        item = stored.items.get(prefix + parameter)
        read = item.properties.dtype if item is not None else None if base is None else base.dtype(parameter)
        return read or torch.float32

    merges = None if adapter is None else merges_of(LoRA.of(adapter["lora"]), tensors, parts, dtype_of)

    origin = model or (Path(described["path"]) if described["path"] else None)
    output = local_path(output, "output")
    if model is not None and not model.is_dir():
        raise CheckpointError(f"{model} is no directory; give the one with the tokenizer.")
    tokenizer = Path(described["tokenizer"]) if model is None and described.get("tokenizer") else None
    write_hf_checkpoint(
        output, written_config(config, dtype), tensors, piece, SINGLE, side_files_from=origin, tokenizer_from=tokenizer,
        merges=merges,
    )  # fmt: skip
    return adapter is not None


def _base(
    checkpoint: str | Path, adapter: dict[str, Any], config: MoEConfig, model: Path | None
) -> WeightSource | None:
    """The weights that an adapter was added to; None where the checkpoint holds them all."""
    if adapter["base"] is None:
        return None
    if adapter["seed"] is not None:
        source: WeightSource = SeededWeights(config, adapter["seed"])
    else:
        path = model or Path(adapter["path"])
        if not path.is_dir():
            raise CheckpointError(
                f"{checkpoint} holds an adapter of {path}, which is not there; say with --model where it is."
            )
        source = CheckpointWeights(HFCheckpoint(path), config)
    if source.fingerprint() != adapter["base"]:
        raise CheckpointError(
            f"{checkpoint} holds an adapter of another model than {model or adapter['path']}, whose configuration, index, "
            "tensor headers or weights differ; say with --model where its base is."
        )
    return source


def _adapter_tensors(stored: StoredTensors, prefix: str) -> dict[str, OutputTensor]:
    found = {}
    for full, item in stored.items.items():
        name = full.removeprefix(prefix)
        if full.startswith(prefix) and is_adapter(name):
            shape = tuple(item.size)
            owners = ((0, (Box.whole(shape),)),)
            found[name] = OutputTensor(shape, item.properties.dtype, (name,), False, owners)
    return found


def _only_model(checkpoint: str | Path, models: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if len(models) != 1:
        what = f"holds the models {', '.join(models)}" if models else "holds no model with MoE layers"
        raise CheckpointError(f"{checkpoint} {what}; moefold export needs a checkpoint with exactly one.")
    return next(iter(models.items()))
