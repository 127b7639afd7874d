# SPDX-License-Identifier: Apache-2.0
"""Optimizers: float32 masters of 16-bit weights, Muon, and a check that an optimizer is elementwise."""

from lightning_moefold.optim.master_weights import MasterWeights
from lightning_moefold.optim.muon import Muon

__all__ = ["MasterWeights", "Muon"]
