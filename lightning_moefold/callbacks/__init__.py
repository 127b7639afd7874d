# SPDX-License-Identifier: Apache-2.0
"""Callbacks: how fast a run is, how evenly its experts are used and moved, what it is made of, and what it writes."""

from lightning_moefold.callbacks.expert_rebalancer import ExpertRebalancer
from lightning_moefold.callbacks.generate_samples import GenerateSamples
from lightning_moefold.callbacks.load_balance import LoadBalanceMonitor
from lightning_moefold.callbacks.mfu import MFUMonitor
from lightning_moefold.callbacks.routing_trace import RoutingTraceRecorder
from lightning_moefold.callbacks.summary import FoldSummary
from lightning_moefold.callbacks.timeline import PipelineTimeline

__all__ = [
    "ExpertRebalancer",
    "FoldSummary",
    "GenerateSamples",
    "LoadBalanceMonitor",
    "MFUMonitor",
    "PipelineTimeline",
    "RoutingTraceRecorder",
]
