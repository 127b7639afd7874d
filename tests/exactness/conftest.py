# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that all comparisons with one process share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where :func:`tests.exactness.shapes.checkpoint` makes each checkpoint once."""
    return tmp_path_factory.mktemp("checkpoints")
