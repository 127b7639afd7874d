# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a layer, and how their products are computed."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.modules.experts.experts import Experts

__all__ = ["Experts"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Experts": "experts",
    },
)
