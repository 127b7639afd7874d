# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint whose tensors are those of another one, changed one by one, in one process.

No more than one output file's tensors are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_moefold.checkpoint import HFCheckpoint, OutputTensor, write_hf_checkpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.errors import InputError
from lightning_moefold.layout import Box
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.models.names import ParameterEntry, bias_entries, parameter_entries
from lightning_moefold.models.weights import CheckpointWeights, read_whole


def read_plain_config(path: str | Path) -> MoEConfig:
    """Reads the configuration of a checkpoint whose experts have one width.

    Raises:
        InputError: If it is packed.
        ConfigError: If the architecture is not supported.
    """
    config = MoEConfig.from_pretrained(path, output_router_logits=False)
    if config.is_packed:
        raise InputError(f"{path} is packed already; moefold camera unpack makes a plain checkpoint of it first.")
    return config


def whole_tensor(entry: ParameterEntry, dtype: torch.dtype) -> OutputTensor:
    """Describes a parameter to write that this process has whole."""
    return OutputTensor(entry.shape, dtype, entry.sources, entry.stacked, ((0, (Box.whole(entry.shape),)),))


def rewrite(
    checkpoint: str | Path, output: str | Path, config: MoEConfig, change: Callable[[str, Tensor], Tensor]
) -> None:
    """Writes the parameters of ``checkpoint`` after a change, with its tokenizer and other files.

    Args:
        checkpoint: Directory in Hugging Face format, or a name on the hub.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        config: Configuration of the new model, which says its shapes.
        change: Function of a parameter's name and value that returns the new value. A parameter that the old model does not
            have is zero.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        OSError: If ``output`` cannot be written.
    """
    path = local_directory(checkpoint)
    old = MoEConfig.from_pretrained(path)
    source = CheckpointWeights(HFCheckpoint(path), old)
    shapes = {name: entry.shape for name, entry in (parameter_entries(old) | bias_entries(old)).items()}
    entries = parameter_entries(config) | {n: e for n, e in bias_entries(config).items() if source.holds(n)}
    some = next(name for name in shapes if name.endswith(".mlp.gate.weight"))
    dtypes = {name: source.dtype(name if source.holds(name) else some) or torch.float32 for name in entries}
    tensors = {name: whole_tensor(entry, dtypes[name]) for name, entry in entries.items()}

    def piece(name: str) -> Tensor:
        if name not in shapes:
            return torch.zeros(entries[name].shape, dtype=dtypes[name])
        return change(name, read_whole(source, name, shapes[name], dtypes[name]))

    write_hf_checkpoint(
        local_path(output, "output"), written_config(config), tensors, piece, SINGLE, side_files_from=path
    )
    source.close()
