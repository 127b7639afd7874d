# SPDX-License-Identifier: Apache-2.0
"""Attention, cut over tensor and context parallel ranks."""

from lightning_moefold.modules.attention.attention import Attention

__all__ = ["Attention"]
