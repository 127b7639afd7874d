# SPDX-License-Identifier: Apache-2.0
"""The planner: predicts speed and memory of folds before anything runs. Pure Python and numpy."""

from lightning_moefold.errors import HardwareError, PlanError
from lightning_moefold.planner.cost.cost import CostModel, Estimate
from lightning_moefold.planner.cost.memory import Memory
from lightning_moefold.planner.cost.routing import PROFILES, RoutingProfile, find_routing
from lightning_moefold.planner.machine.hardware import PRESETS, Hardware, Kernels, Link, find_hardware
from lightning_moefold.planner.search.auto import AutoFold, Choice, choose, machine_for
from lightning_moefold.planner.search.job import Job, Plan
from lightning_moefold.planner.search.models_zoo import MODELS, find_model
from lightning_moefold.planner.search.robust import search
from lightning_moefold.planner.search.search import Planner, Result
from lightning_moefold.planner.search.space import Space

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
