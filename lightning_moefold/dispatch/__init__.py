# SPDX-License-Identifier: Apache-2.0
"""Token dispatchers: how tokens travel to their experts and back."""

from typing import TYPE_CHECKING

from lightning_moefold.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_moefold.dispatch.base import Choices, ExpertAxes, ExpertRows, Parcel, Return, TokenDispatcher
    from lightning_moefold.dispatch.config import DispatchConfig, choose_dispatcher, settle
    from lightning_moefold.dispatch.registry import make_dispatcher

__all__ = [
    "Choices",
    "DispatchConfig",
    "ExpertAxes",
    "ExpertRows",
    "Parcel",
    "Return",
    "TokenDispatcher",
    "choose_dispatcher",
    "make_dispatcher",
    "settle",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Choices": "base",
        "DispatchConfig": "config",
        "ExpertAxes": "base",
        "ExpertRows": "base",
        "Parcel": "base",
        "Return": "base",
        "TokenDispatcher": "base",
        "choose_dispatcher": "config",
        "make_dispatcher": "registry",
        "settle": "config",
    },
)
