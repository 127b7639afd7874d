# SPDX-License-Identifier: Apache-2.0
"""NonFiniteGuard: a NaN or infinite loss or gradient changes no weight, and is traced to its layer and rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.callbacks.common import fold_strategy
from lightning_moefold.callbacks.loss_spikes import LossSpike, SpikeDetector, describe_rows
from lightning_moefold.diagnostics.first_bad import Place, bad_tensors, family_of, layer_of
from lightning_moefold.errors import InputError, NonFiniteError
from lightning_moefold.lifecycle.replay import Replay
from lightning_moefold.lifecycle.step_check import NotFinite, StepCheck, StepNumbers
from lightning_moefold.strategy import MoEFoldStrategy

#: After this many skipped steps in a row a run stops: skipping does not help.
MOST_IN_A_ROW = 10


@dataclass(frozen=True)
class NonFinite:
    """A number that was not finite, as all ranks know it.

    Args:
        step: Number of the optimizer step, from 1; the step was not made.
        what: ``"weight"``, ``"output"``, ``"gradient of the input"``, ``"gradient of the output"``, ``"loss"``, or
            ``"gradient"`` where the search found nothing.
        name: Name of the module or parameter in the LightningModule.
        layer: Number of the layer in the whole model; None outside of the layers.
        family: ``"attention"``, ``"experts"``, ``"router"``, ``"embedding"``, ``"norm"`` and so on.
        ranks: Ranks on which it was seen first. Of a ``"gradient"``, those that hold it after the reduction.
        batch: Number of the batch in the epoch that gave it when it was run again; None if none was.
    """

    step: int
    what: str
    name: str
    layer: int | None
    family: str
    ranks: tuple[int, ...]
    batch: int | None = None

    def __str__(self) -> str:
        where = self.family if self.layer is None else f"layer {self.layer}, {self.family}"
        ranks = ", ".join(map(str, self.ranks[:8])) + (", ..." if len(self.ranks) > 8 else "")
        seen = f"on rank{'s' * (len(self.ranks) > 1)} {ranks}"
        if self.what == "gradient":
            return f"the gradient of {self.name} ({where}) {seen}, after the reduction"
        found = "" if self.batch is None else f", when batch {self.batch} was run again"
        return f"the {self.what} of {self.name} ({where}) {seen}{found}"


class NonFiniteGuard(pl.Callback):
    """Keeps a NaN or infinity out of weights, optimizer state and checkpoints.

    Before each optimizer step, all ranks learn in one sum whether a loss or gradient of any of them is not finite. Such a
    step is never made: weights, float32 masters and moments stay as they are, expert biases are not updated, and the
    step's tokens are taken off the load counters and all buffers (running statistics). Then the batches of the step are run
    again to find where the first bad number arises: module, layer, family and rank. With ``"skip"`` the run continues with
    the next batch, and the step counts as one: ``global_step`` and learning-rate schedulers advance. With ``"stop"`` every
    rank raises :class:`~lightning_moefold.errors.NonFiniteError`. A run also stops if weights are not finite, and after ten
    skipped steps in a row. A checkpoint whose weights or moments are not finite is not written; the run stops.

    Args:
        action: What to do: ``"stop"`` or ``"skip"``.
        locate: Whether to run the batches again. Then ``training_step`` runs twice for these batches, without logging; turn
            it off if it has other effects. Batches are not run again under manual optimization, nor if ``training_step``
            takes the ``dataloader_iter``.
        spike_width: A finite loss is a spike if it exceeds the median of the latest 128 by this many standard deviations; one
            warning then says which rows it came from. None to look for none.

    Attributes:
        events: What was found, in order; the same on every rank.
        spikes: Loss spikes, in order.
        skipped: Number of skipped steps.

    Raises:
        InputError: For an unknown action, and in a fit without ``MoEFoldStrategy``.

    Example::

        trainer = L.Trainer(strategy=MoEFoldStrategy(fold="tp2 | ep4"), callbacks=[NonFiniteGuard("skip")])
    """

    def __init__(
        self, action: Literal["stop", "skip"] = "stop", *, locate: bool = True, spike_width: float | None = 10.0
    ) -> None:
        super().__init__()
        if action not in ("stop", "skip"):
            raise InputError(f"action={action!r} is not known; use 'stop' or 'skip'.")
        if spike_width is not None and not spike_width > 0:
            raise InputError(f"spike_width={spike_width} must be above 0, or None.")
        self.action, self.locate, self.spike_width = action, locate, spike_width
        self.events: list[NonFinite] = []
        self.spikes: list[LossSpike] = []
        self.skipped = 0
        self._in_a_row = 0
        self._replay: Replay | None = None
        self._trainer: pl.Trainer | None = None
        self._detector: SpikeDetector | None = None

    # ---- life cycle --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, MoEFoldStrategy):
            raise InputError(
                f"NonFiniteGuard checks steps inside MoEFoldStrategy, but the Trainer has {type(trainer.strategy).__name__}; "
                "use MoEFoldStrategy, or leave the guard out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = fold_strategy(trainer)
        self._trainer, self._in_a_row = trainer, 0
        self._replay = Replay(trainer, pl_module, self.locate)
        self._detector = None if self.spike_width is None else SpikeDetector(self.spike_width)
        strategy._precision.step_check = StepCheck(strategy.mesh, strategy.root_device, self._passed, self._failed)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._replay is not None
        self._replay.begin(batch, batch_idx)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._replay is not None and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._replay.end()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fold_strategy(trainer)._precision.step_check = None
        self._replay = self._trainer = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._trainer is not None:  # the fit ended by an error
            self.on_train_end(trainer, pl_module)

    # ---- steps -------------------------------------------------------------------------------------------------

    def _passed(self, numbers: StepNumbers) -> None:
        assert self._trainer is not None
        self._in_a_row = 0
        if self._detector is None or self._replay is None or not any(numbers.loss_D):  # training_step returned None
            return
        loss = sum(numbers.loss_D) / len(numbers.loss_D)
        if (usual := self._detector.add(loss)) is None:
            return
        low, high = min(numbers.loss_D), max(numbers.loss_D)
        worst = numbers.loss_D.index(high) if high > low else None
        rows = tuple(describe_rows(self._trainer, batch, index) for batch, index in self._replay.batches)
        spike = LossSpike(self._trainer.global_step + 1, loss, usual, worst, rows)
        self.spikes.append(spike)
        where = "" if worst is None else f", the largest on data rank {worst}"
        rank_zero_warn(
            f"the loss of step {spike.step} is {loss:.4g}, and that of the latest steps {usual:.4g}{where}: {'; '.join(rows)}."
        )

    def _failed(self, step: NotFinite) -> None:
        trainer, replay = self._trainer, self._replay
        assert trainer is not None
        assert replay is not None
        registry = fold_strategy(trainer).registry
        gradients = bad_tensors((n, p.grad) for n, p in registry.named_parameters() if p.grad is not None)
        replay.take_back()
        event = self._find(trainer, replay, gradients)
        self.events.append(event)
        self.skipped += 1
        self._in_a_row += 1
        finite = {"the loss": step.numbers.losses_are_finite, "the gradients": step.numbers.gradients_are_finite}
        what = " and ".join(name for name, fine in finite.items() if not fine)
        begin = f"step {event.step}: {what} {'is' if what == 'the loss' else 'are'} not finite; first {event}"
        if not replay.batches or event.what == "gradient":
            begin += self._unlocated(replay)
        replay.end()
        if event.what == "weight":
            raise NonFiniteError(f"{begin}; resume from an earlier checkpoint.")
        if self.action == "stop":
            raise NonFiniteError(f"{begin}; the step was not made, and the run is stopped.")
        if self._in_a_row > MOST_IN_A_ROW:
            raise NonFiniteError(
                f"{begin}; {MOST_IN_A_ROW} steps before it were skipped, too, so skipping does not help and the run is stopped."
            )
        rank_zero_warn(f"{begin}; the step is skipped.")

    def _unlocated(self, replay: Replay) -> str:
        if not replay.searches:
            return " (the batches were not run again)"
        return (
            " (when the batches were run again, everything was finite: suspect the hardware, or an operation that is not "
            "repeatable)"
        )

    def _find(self, trainer: pl.Trainer, replay: Replay, gradients: list[str]) -> NonFinite:
        """Returns the first bad number: a weight, else what the search finds, else a gradient. Collective."""
        strategy, step = fold_strategy(trainer), trainer.global_step + 1
        weights = bad_tensors(strategy.registry.named_parameters())
        told = comm.all_gather_objects((weights[:1], gradients[-1:]), strategy.mesh.world)
        if (first := _first([names for names, _ in told], "weight")) is not None:
            return _event(step, "weight", *first)
        if replay.searches:
            found = replay.search(strategy.mesh.world)
            if found.places:
                place: Place = next(iter(found.places.values()))
                return NonFinite(
                    step, place.what, place.name, place.layer, place.family, tuple(found.places), found.batch
                )
        first = _first([names for _, names in told], "gradient")
        if first is None:
            return _event(step, "loss", "training_step", tuple(range(len(told))))
        return _event(step, "gradient", *first)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        strategy = fold_strategy(trainer)
        if strategy._registry is None or self._trainer is None:
            return
        registry = strategy.registry
        bad = bad_tensors(registry.named_parameters())
        names = {id(p): name for name, p in registry.named_parameters()}
        for optimizer in trainer.optimizers:
            for parameter, values in optimizer.state.items():
                state = ((key, value) for key, value in values.items() if hasattr(value, "isfinite"))
                bad += [f"{key} of {names.get(id(parameter), '?')}" for key in bad_tensors(state)]
        first = _first(comm.all_gather_objects(bad[:1], strategy.mesh.world), "weight")
        if first is not None:
            raise NonFiniteError(
                f"the checkpoint of step {trainer.global_step} is not written, because {first[0]} is not finite on rank "
                f"{first[1][0]}; resume from an earlier checkpoint."
            )


def _first(names_by_rank: list[list[str]], what: str) -> tuple[str, tuple[int, ...]] | None:
    """Returns the first name on the way of the data, and the ranks that say it; None if nobody has a name."""
    names = [name for names in names_by_rank for name in names[:1]]
    if not names:
        return None
    name = min(names, key=lambda name: Place(what, name).key(staged=True))
    return name, tuple(rank for rank, names in enumerate(names_by_rank) if name in names[:1])


def _event(step: int, what: str, name: str, ranks: tuple[int, ...]) -> NonFinite:
    return NonFinite(step, what, name, layer_of(name), family_of(name), ranks)
