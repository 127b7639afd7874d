# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks of one data replica received the same batch.

If they did not, stages of a pipeline would wait for each other forever. Each rank computes a small number from its
data, and adds this number and its square to the two slots of its data rank in a sum over all ranks. The numbers of a
replica are equal exactly if the number of its ranks times the sum of squares equals the square of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moefold.errors import BatchError
from lightning_moefold.mesh import FoldedMesh

#: Numbers are below this prime, so that sums of their squares are exact in float64.
PRIME = 1048573


def fingerprint(tensor: Tensor) -> Tensor:
    """Hashes the bits of a tensor to a number below :data:`PRIME`, a scalar int64 on its device."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = raw.view(torch.int32) if raw.numel() % 4 == 0 and raw.storage_offset() % 4 == 0 else raw
    place = torch.arange(words.numel(), device=words.device) % 8191 + 1
    return (words.long() % PRIME * place % PRIME).sum() % PRIME


def same_batch_slots(number: Tensor, mesh: FoldedMesh) -> Tensor:
    """Returns this rank's term of the sum, ``[dp, 2]`` float64.

    Args:
        number: Fingerprint of all data that this rank received, below :data:`PRIME`.
        mesh: The folded mesh.
    """
    slots = torch.zeros(mesh.fold.dp, 2, dtype=torch.float64, device=number.device)
    slots[mesh.place["dp"]] = torch.stack([number, number * number]).double()
    return slots


def check_same_batch(totals: Tensor, mesh: FoldedMesh) -> None:
    """Raises if ranks of a replica were given different batches.

    Args:
        totals: The results of :func:`same_batch_slots`, summed over all ranks.
        mesh: The folded mesh.

    Raises:
        BatchError: If they were; raised on every rank.
    """
    first, second = totals.view(-1, 2).unbind(1)
    if bool((second * (mesh.fold.tp * mesh.fold.cp * mesh.fold.pp) != first * first).any()):
        raise BatchError(
            "ranks of a tensor, context or pipeline parallel group were given different batches or arguments, but they "
            "compute one batch together; shard the data by strategy.dp_rank and strategy.dp_size, and shuffle with a seed "
            "that all share."
        )
