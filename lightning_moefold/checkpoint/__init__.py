# SPDX-License-Identifier: Apache-2.0
"""Files: reading and writing Hugging Face checkpoints, and layout-free training checkpoints.

This package deals with files, names and boxes of tensors; it does not know models.
"""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.checkpoint.hf_reader import HFCheckpoint
    from lightning_moefold.checkpoint.hf_writer import OutputTensor, write_hf_checkpoint
    from lightning_moefold.errors import CheckpointError

__all__ = ["CheckpointError", "HFCheckpoint", "OutputTensor", "write_hf_checkpoint"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckpointError": "hf_reader",
        "HFCheckpoint": "hf_reader",
        "OutputTensor": "hf_writer",
        "write_hf_checkpoint": "hf_writer",
    },
)
