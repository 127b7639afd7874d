# SPDX-License-Identifier: Apache-2.0
"""Policies of expert balance, by name."""

from lightning_moefold.balance.policies.base import Policy
from lightning_moefold.balance.policies.registry import POLICIES, make_policy

__all__ = ["POLICIES", "Policy", "make_policy"]
