# SPDX-License-Identifier: Apache-2.0
"""Callbacks: a run's speed, use of its experts, make-up, written samples, and whether its numbers are sound."""

from lightning_moefold.callbacks.expert_rebalancer import ExpertRebalancer
from lightning_moefold.callbacks.generate_samples import GenerateSamples
from lightning_moefold.callbacks.load_balance import LoadBalanceMonitor
from lightning_moefold.callbacks.mfu import MFUMonitor
from lightning_moefold.callbacks.non_finite_guard import NonFiniteGuard
from lightning_moefold.callbacks.replica_guard import ReplicaGuard
from lightning_moefold.callbacks.routing_trace import RoutingTraceRecorder
from lightning_moefold.callbacks.save_adapter import SaveAdapter
from lightning_moefold.callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_moefold.callbacks.summary import FoldSummary
from lightning_moefold.callbacks.timeline import PipelineTimeline

__all__ = [
    "ExpertRebalancer",
    "FoldSummary",
    "GenerateSamples",
    "LoadBalanceMonitor",
    "MFUMonitor",
    "NonFiniteGuard",
    "PipelineTimeline",
    "ReplicaGuard",
    "RoutingTraceRecorder",
    "SaveAdapter",
    "SaveOnInterrupt",
]
