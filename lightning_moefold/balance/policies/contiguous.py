# SPDX-License-Identifier: Apache-2.0
"""Experts in blocks of consecutive numbers, for ever: plain expert parallelism, against which the others are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_moefold.balance.policies.base import Policy


@dataclass(frozen=True)
class Contiguous(Policy):
    """Moves nothing and copies nothing."""

    name: ClassVar[str] = "contiguous"
    summary: ClassVar[str] = "homes in blocks, no copies"
