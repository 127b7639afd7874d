# SPDX-License-Identifier: Apache-2.0
"""Training with DualPipeV, its pairs taking turns and not; run by the ranks of the pool."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from lightning_moefold.parallel.pipeline import engine, paired_passes
from tests.dispatch.jobs_overlap import Events, noted
from tests.exactness import runs


@dataclass
class Seen:
    """By one rank.

    Args:
        pairs: What the passes of each pair did, in order: ``F`` forward, ``B`` backward.
        others: What else happened.
        differ: Names of gradients and weights whose bits are others without pairs.
        compared: How many there were.
    """

    pairs: list[Events] = field(default_factory=list)
    others: Events = field(default_factory=list)
    differ: list[str] = field(default_factory=list)
    compared: int = 0


def _who() -> str:
    return "F " if threading.current_thread() is threading.main_thread() else "B "


def _tensors(run: runs.RankRun) -> dict[str, Any]:
    found = {
        f"gradient {step} of {name}": piece for step, grads in enumerate(run.grads) for name, piece in grads.items()
    }
    return found | run.weights | {"losses": run.losses}


def _same(a: Any, b: Any) -> bool:
    """Losses, or pieces: a shape, boxes, and the tensors in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def train(checkpoint: str, fold: str, batches: list[Any], spec: dict[str, Any]) -> Seen:
    """Twice, and compares."""
    seen, take_turns = Seen(), paired_passes.take_turns

    def pair(*args: Any) -> Any:
        seen.others.extend(events)
        events.clear()
        result = take_turns(*args)
        seen.pairs.append(list(events))
        events.clear()
        return result

    events: Events = []
    with noted(events, _who), mock.patch.object(paired_passes, "take_turns", pair):
        paired = _tensors(runs.train(checkpoint, fold, batches, spec))
    seen.others.extend(events)
    with mock.patch.object(engine, "pair_passes", return_value=None):
        plain = _tensors(runs.train(checkpoint, fold, batches, spec))
    assert paired.keys() == plain.keys()
    seen.compared = len(paired)
    seen.differ = [name for name in paired if not _same(paired[name], plain[name])]
    return seen
