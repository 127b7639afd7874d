# SPDX-License-Identifier: Apache-2.0
"""Seeds dataloader workers, so that all ranks of a data replica draw the same random numbers."""

from __future__ import annotations

import os
from functools import partial

from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_moefold.sampler import ResumableSampler


def seed_workers(dataloader: object, dp_rank: int) -> None:
    """Seeds the workers of a ``DataLoader`` by data rank, where Lightning would seed them by global rank.

    Lightning sets its own function after the strategy has processed the loader, but only if there is none. A loader
    from an earlier Trainer holds Lightning's function.
    """
    if not isinstance(dataloader, DataLoader):
        return
    sampler = dataloader.sampler
    if (
        isinstance(sampler, DistributedSampler)
        and not isinstance(sampler, ResumableSampler)
        and sampler.shuffle
        and dataloader.generator is not None
    ):
        rank_zero_warn(
            "the generator of a DataLoader does not set the order of its rows, which Lightning's sampler draws from the "
            "seed of seed_everything; Trainer(use_distributed_sampler=False) keeps the loader's own."
        )
    function = dataloader.worker_init_fn
    lightnings = isinstance(function, partial) and function.func is pl_worker_init_function
    if lightnings or (function is None and int(os.environ.get("PL_SEED_WORKERS", 0))):
        dataloader.worker_init_fn = partial(pl_worker_init_function, rank=dp_rank)
