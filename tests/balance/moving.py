# SPDX-License-Identifier: Apache-2.0
"""Experts that change places at random after every optimizer step, and what the ranks hold before and after."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import MoECausalLM
from lightning_moefold.balance.placement import Placement
from lightning_moefold.parallel import local_part, migration
from lightning_moefold.testing.pieces import Piece, piece_of


def layer_names(model: MoECausalLM, prefix: str = "model") -> list[str]:
    """The MoE layers of the whole model, also those of other pipeline stages, as the LightningModule names them."""
    stacks = (name for name, layout in model.layouts.items() if layout.is_expert_stack)
    return sorted({f"{prefix}.{name.partition('.experts.')[0]}" for name in stacks})


def drawn(model: MoECausalLM, seed: int) -> dict[str, Placement]:
    """A random placement of every layer, the same on every rank."""
    generator = random.Random(seed)
    experts = model.config.num_experts
    return {
        name: Placement(tuple(generator.sample(range(experts), experts)), model.fold.ep) for name in layer_names(model)
    }


def held(model: MoECausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
    """All that this rank holds of parameters, gradients and state, owned or not."""
    pieces: dict[str, Piece] = {}
    for name, parameter in model.named_parameters():
        tensors = {"weight": parameter, "grad": parameter.grad, **optimizer.state.get(parameter, {})}
        layout = model.layouts[name]
        for key, value in tensors.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                pieces[f"{name}:{key}"] = piece_of(local_part(value).clone(), layout, model.fold, model.rank)
    return pieces


class RandomMoves(pl.Callback):
    """Moves the experts of all layers after every step.

    Args:
        run: Where to keep what was held before and after each move.
        seed: Of the placements.
        plant: Leave one expert's state behind: ``exp_avg_sq`` does not move.
        renumber: Number slots so that what stays on its rank stays in its slot.
        exchange: Bytes of an exchange.
        keep: Keep what was held.
        steps: After which to move; None for all.
    """

    def __init__(
        self, run: Any, seed: int = 0, plant: bool = False, renumber: bool = False, exchange: int | None = None,
        keep: bool = True, steps: list[int] | None = None,
    ) -> None:  # fmt: skip
        self.run, self.seed, self.plant, self.renumber, self.keep, self.steps = run, seed, plant, renumber, keep, steps
        self.exchange, self.step = exchange, 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:  # batches accumulate
            return
        self.step = trainer.global_step
        if self.steps is not None and self.step not in self.steps:
            return
        model, optimizer = module.model, trainer.optimizers[0]
        model.release_gathered_weights()
        placements = drawn(model, self.seed * 1000 + trainer.global_step)
        if self.renumber:
            here = {f"model.model.layers.{i}.mlp": layer.placement for i, layer in model.moe_layers().items()}
            placements = {n: p.renumbered(here[n]) for n, p in placements.items()}
        before = held(model, optimizer) if self.keep else {}
        stock, tensors_of = migration.EXCHANGE_BYTES, migration._tensors_of
        if self.plant:
            migration._tensors_of = lambda *a: (t for t in tensors_of(*a) if not t[0].endswith("exp_avg_sq"))
        migration.EXCHANGE_BYTES = self.exchange or stock
        try:
            trainer.strategy.move_experts(placements)
        finally:
            migration.EXCHANGE_BYTES, migration._tensors_of = stock, tensors_of
        self.run.moves.append((before, held(model, optimizer) if self.keep else {}))


class MoveEverything(pl.Callback):
    """Moves the experts of all layers of any network after every step."""

    def __init__(self) -> None:
        self.known: dict[str, Placement] = {}
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, trainer.strategy.registry.placements())
        self.known = {name: placement for part in everyone for name, placement in part.items()}
        assert self.known

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step, generator = trainer.global_step, random.Random(trainer.global_step)
        self.known = {
            name: Placement(tuple(generator.sample(range(p.num_experts), p.num_experts)), p.parts)
            for name, p in sorted(self.known.items())
        }
        trainer.strategy.move_experts(self.known)


def check_bits(befores: Iterable[dict[str, Piece]], afters: Iterable[dict[str, Piece]]) -> int:
    """Every rank holds in logical order, bit by bit, what was held before; returns how many tensors were looked at."""
    whole: dict[str, Tensor] = {}
    for name, (place, shape), part in _parts(befores):
        whole.setdefault(name, torch.zeros(shape, dtype=part.dtype))[place] = part
    seen = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in whole.items()}
    for name, (place, _), part in _parts(afters):
        assert torch.equal(whole[name][place], part), f"{name} has changed in a move"
        seen[name][place] = True
    assert all(bool(places.all()) for places in seen.values())
    return len(whole)


def _parts(held_by_ranks: Iterable[dict[str, Piece]]) -> Iterator[tuple[str, tuple[Any, Any], Tensor]]:
    for pieces in held_by_ranks:
        for name, (starts, shape, parts) in pieces.items():
            for offsets, part in zip(starts, parts, strict=True):
                place = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
                yield name, (place, shape), part
