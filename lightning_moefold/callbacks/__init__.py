# SPDX-License-Identifier: Apache-2.0
"""Callbacks: how fast a run is, how evenly its experts are used, and what it is made of."""

from lightning_moefold.callbacks.load_balance import LoadBalanceMonitor
from lightning_moefold.callbacks.mfu import MFUMonitor
from lightning_moefold.callbacks.summary import FoldSummary

__all__ = ["FoldSummary", "LoadBalanceMonitor", "MFUMonitor"]
