# SPDX-License-Identifier: Apache-2.0
"""Ranks are started once for the whole session: starting one costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lightning_moefold.mesh import forget_groups
from lightning_moefold.testing import RankPool

pytest_plugins = ["tests.resuming"]


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to eight gloo ranks, shared by all tests of the session."""
    with RankPool(8) as ranks:
        yield ranks


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left() -> Iterator[None]:
    """A Trainer in this process makes a default group, which the next file's tests want to make themselves."""
    yield
    if dist.is_initialized():
        forget_groups()
        dist.destroy_process_group()
