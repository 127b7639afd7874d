# SPDX-License-Identifier: Apache-2.0
"""Optimizers: float32 masters of 16-bit weights, Muon, state in host memory, and a check that an optimizer is elementwise."""

from lightning_moefold.optim.master_weights import MasterWeights
from lightning_moefold.optim.muon import Muon
from lightning_moefold.optim.state_offload import offload_state

__all__ = ["MasterWeights", "Muon", "offload_state"]
