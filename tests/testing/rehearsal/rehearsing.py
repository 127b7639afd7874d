# SPDX-License-Identifier: Apache-2.0
"""Rehearses a rank and compares what it holds and sends with what the fold requires."""

from __future__ import annotations

from dataclasses import replace

from lightning_moefold import Fold
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.testing.rehearsal.expected import expected_messages
from lightning_moefold.testing.rehearsal.messages import Message, as_counter
from lightning_moefold.testing.rehearsal.scale import Rehearsal, Step, rehearse

#: Of two layers and six heads, of which two or three go together in a ring, so that its groups of heads are unequal.
SMALL = replace(
    MODELS["qwen1.5-moe-a2.7b"], output_router_logits=True, num_hidden_layers=2, num_experts=16, vocab_size=1024,
    num_attention_heads=6, num_key_value_heads=6, head_dim=128,
)  # fmt: skip


def check(step: Step, fold: str, world: int, rank: int) -> Rehearsal:
    """Fails unless a rank holds and sends exactly what it must; returns what it did."""
    done, missing, unforeseen = differences(step, fold, world, rank)
    assert done.memory == done.promised
    assert not missing
    assert not unforeseen
    assert done.seconds["mesh"] < 5
    return done


def differences(
    step: Step, fold: str, world: int, rank: int
) -> tuple[Rehearsal, dict[Message, int], dict[Message, int]]:
    """What a rank did, what it failed to send, and what it sent beside."""
    done = rehearse(step, Fold.parse(fold, world), rank)
    expected = as_counter(expected_messages(step, done.fold, rank, done.model.layouts))
    return done, dict(expected - done.messages), dict(done.messages - expected)
