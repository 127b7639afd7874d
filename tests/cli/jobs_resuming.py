# SPDX-License-Identifier: Apache-2.0
"""Ranks that look for the last checkpoint while another run saves."""

from __future__ import annotations

import torch.distributed as dist

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.cli.resuming import agreed_last_checkpoint
from tests.strategy.plain_modules import trainer


def last_of(roots: list[str]) -> str | None:
    """What this rank resumes from, or its error; each rank sees the files of its own folder."""
    run = trainer(MoEFoldStrategy(), default_root_dir=roots[dist.get_rank()])
    try:
        return agreed_last_checkpoint(run)
    except ValueError as error:
        return str(error)
