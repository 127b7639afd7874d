# SPDX-License-Identifier: Apache-2.0
"""A module and a data module for the usual job: train a MoE language model on text, measure it, predict with it."""

from lightning_moefold.errors import InputError, is_users
from lightning_moefold.recipes.data import TextData
from lightning_moefold.recipes.distill import distillation_loss, top_log_probabilities
from lightning_moefold.recipes.module import FineTuneModule
from lightning_moefold.recipes.pairs import PreferenceData
from lightning_moefold.recipes.preference import PreferenceModule
from lightning_moefold.recipes.stream import StreamData

__all__ = [
    "FineTuneModule",
    "InputError",
    "PreferenceData",
    "PreferenceModule",
    "StreamData",
    "TextData",
    "distillation_loss",
    "is_users",
    "top_log_probabilities",
]
