# SPDX-License-Identifier: Apache-2.0
"""Ranks are started once for the whole session: starting one costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_moefold.testing import RankPool

pytest_plugins = ["tests.resuming"]


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to eight gloo ranks, shared by all tests of the session."""
    with RankPool(8) as ranks:
        yield ranks
