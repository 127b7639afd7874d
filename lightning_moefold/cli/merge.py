# SPDX-License-Identifier: Apache-2.0
"""``moefold merge``: a model with an adapter as a model without, by one process and file by file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lightning_moefold.adapters.adapter import merges_of
from lightning_moefold.checkpoint import HFCheckpoint, write_hf_checkpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.compression.rewrite import whole_tensor
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.models.export import DTYPES
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.models.names import ParameterEntry, bias_entries, parameter_entries
from lightning_moefold.models.weights import CheckpointWeights, WeightSource, read_whole


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold merge``."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="the model, in Hugging Face format, or its name on the hub")
    add("--adapter", required=True, type=Path, metavar="DIR", help="its adapter, in PEFT's format")
    add("--output", required=True, metavar="DIR", help="directory to write; one with a model is replaced")
    add("--dtype", choices=DTYPES, help="of the weights on disk (default: that of the model)")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold merge``."""
    merge(arguments.checkpoint, arguments.adapter, arguments.output, arguments.dtype)
    print(f"{arguments.output} can be loaded by transformers; {arguments.adapter} is merged into its weights.")
    return 0


def merge(checkpoint: str | Path, adapter: str | Path, output: str | Path, dtype: str | None = None) -> None:
    """Writes ``W + s B A`` for each weight that an adapter changes, and the others as they are.

    Sums are taken in a wider dtype than the weights', so the result is exact to its rounding. No more than one output file's
    tensors are in memory at a time, and sums of experts are taken one expert after the other.

    Args:
        checkpoint: Directory of the model.
        adapter: Directory of the adapter, in PEFT's format.
        output: Directory to make; one that holds a model is replaced, one with other files in it is refused.
        dtype: On disk; that of the model by default.

    Raises:
        CheckpointError: If model or adapter is damaged, or they do not belong together.
        OSError: If ``output`` holds other files.
    """
    checkpoint = local_directory(checkpoint)
    config = MoEConfig.from_pretrained(checkpoint)
    source = CheckpointWeights(HFCheckpoint(checkpoint), config)
    with torch.device("meta"):
        model = MoECausalLM(config)
        model.load_adapter(adapter)
    added = model.adapter
    assert added is not None
    entries = parameter_entries(config) | {n: e for n, e in bias_entries(config).items() if source.holds(n)}
    stored = {name: source.dtype(name) or torch.float32 for name in entries}
    kinds = dict.fromkeys(entries, getattr(torch, dtype)) if dtype else stored
    tensors = {name: whole_tensor(entry, kinds[name]) for name, entry in entries.items()}
    parts = {n: whole_tensor(ParameterEntry(shape, (n,)), torch.float64) for n, shape in added.shapes.items()}

    def piece(name: str) -> Tensor:
        if name in added.shapes:
            values: WeightSource = added.source  # type: ignore[assignment]  # it has no hash, which nobody asks for here
            return read_whole(values, name, added.shapes[name], torch.float64)
        return read_whole(source, name, entries[name].shape, stored[name])

    written = written_config(config)
    if dtype is not None:
        written = {k: v for k, v in written.items() if k != "torch_dtype"} | {"dtype": dtype}
    merges = merges_of(added.lora, tensors, parts, stored.__getitem__)
    write_hf_checkpoint(
        local_path(output, "output"), written, tensors, piece, SINGLE, side_files_from=checkpoint, merges=merges
    )
    source.close()
    added.source.close()
