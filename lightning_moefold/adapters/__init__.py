# SPDX-License-Identifier: Apache-2.0
"""Adapters: what they are, which modules have them, and their files in PEFT's format."""

from lightning_moefold.adapters.config import LoRA

__all__ = ["LoRA"]
