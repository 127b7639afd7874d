# SPDX-License-Identifier: Apache-2.0
"""Token dispatchers: how tokens travel to their experts and back."""

from lightning_moefold.dispatch.alltoall import AllToAllDispatcher, DispatchPlan

__all__ = ["AllToAllDispatcher", "DispatchPlan"]
