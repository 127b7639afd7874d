# SPDX-License-Identifier: Apache-2.0
"""Optimizers: float32 masters of 16-bit weights, and the watch that keeps optimizers elementwise."""

from lightning_moefold.optim.master_weights import MasterWeights

__all__ = ["MasterWeights"]
