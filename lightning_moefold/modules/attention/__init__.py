# SPDX-License-Identifier: Apache-2.0
"""Attention, cut over tensor and context parallel ranks."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.modules.attention.attention import Attention

__all__ = ["Attention"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Attention": "attention",
    },
)
