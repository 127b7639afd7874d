# SPDX-License-Identifier: Apache-2.0
"""Numbers of the Trainer that mean nothing are refused before training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_moefold.errors import InputError
from lightning_moefold.fold import Fold
from lightning_moefold.lifecycle.unsupported import check_trainer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gradient_clip_val": -1}, "gradient_clip_val=-1 would clip nothing"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be at least 1"),
        ({"gradient_clip_val": 0.0}, None),
        ({"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}, None),
    ],
)
def test_numbers_of_the_trainer(options: dict[str, Any], sentence: str | None) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
    if sentence is None:
        check_trainer(trainer, BoringModel(), Fold(1))
        return
    with pytest.raises(InputError, match=sentence):
        check_trainer(trainer, BoringModel(), Fold(1))
