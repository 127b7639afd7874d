# SPDX-License-Identifier: Apache-2.0
"""The planner: which fold, how fast, how much memory, before anything runs. Pure Python and numpy."""

from lightning_moefold.planner.auto import AutoFold, Choice, choose, machine_for
from lightning_moefold.planner.cost import CostModel, Estimate
from lightning_moefold.planner.hardware import PRESETS, Hardware, HardwareError, Kernels, Link, find_hardware
from lightning_moefold.planner.job import Job, Plan, PlanError
from lightning_moefold.planner.memory import Memory
from lightning_moefold.planner.models_zoo import MODELS, find_model
from lightning_moefold.planner.routing import PROFILES, RoutingProfile, find_routing
from lightning_moefold.planner.search import Planner, Result, Space, search

__all__ = [
    "MODELS",
    "PRESETS",
    "PROFILES",
    "AutoFold",
    "Choice",
    "CostModel",
    "Estimate",
    "Hardware",
    "HardwareError",
    "Job",
    "Kernels",
    "Link",
    "Memory",
    "Plan",
    "PlanError",
    "Planner",
    "Result",
    "RoutingProfile",
    "Space",
    "choose",
    "find_hardware",
    "find_model",
    "find_routing",
    "machine_for",
    "search",
]
