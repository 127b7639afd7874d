# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: their configuration, the modules that have them, and their files in PEFT's format."""

from lightning_moefold.adapters.config import LoRA

__all__ = ["LoRA"]
