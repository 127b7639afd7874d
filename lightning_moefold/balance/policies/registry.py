# SPDX-License-Identifier: Apache-2.0
"""All policies by name."""

from __future__ import annotations

import difflib

from lightning_moefold.balance.policies.base import Contiguous, Policy
from lightning_moefold.balance.policies.eplb import EPLB
from lightning_moefold.balance.policies.fastermoe_shadow import FasterMoEShadow
from lightning_moefold.balance.policies.flexmoe import FlexMoE
from lightning_moefold.balance.policies.joint import Joint
from lightning_moefold.balance.policies.llep import LLEP
from lightning_moefold.balance.policies.smartmoe_greedy import SmartMoEGreedy
from lightning_moefold.errors import InputError

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Contiguous, SmartMoEGreedy, EPLB, FlexMoE, FasterMoEShadow, LLEP, Joint)
}


def make_policy(name: str, max_copies_per_rank: int = 1) -> Policy:
    """A policy by name.

    Args:
        name: A key of :data:`POLICIES`.
        max_copies_per_rank: Experts that a rank may hold besides its own.

    Raises:
        InputError: If there is none of this name, or the number is negative.
    """
    if name not in POLICIES:
        close = difflib.get_close_matches(name, POLICIES, 1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"policy {name!r} is not known{guess}; use {', '.join(POLICIES)}.")
    if max_copies_per_rank < 0:
        raise InputError(f"max_copies_per_rank={max_copies_per_rank} must not be negative; 0 makes no copies.")
    return POLICIES[name](max_copies_per_rank)
