# SPDX-License-Identifier: Apache-2.0
"""The model that is saved and loaded."""

from __future__ import annotations

import pytest

from lightning_moefold.testing import make_checkpoint


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose vocabulary does not divide by any number of ranks."""
    folder = tmp_path_factory.mktemp("model") / "qwen"
    return str(make_checkpoint(folder, "qwen2_moe", num_experts=4, vocab_size=97, moe_intermediate_size=8))
