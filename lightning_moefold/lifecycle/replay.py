# SPDX-License-Identifier: Apache-2.0
"""What is needed to take back the batches of an optimizer step, and to run them again in search of the first bad number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_moefold import comm
from lightning_moefold.diagnostics.first_bad import Place, watching
from lightning_moefold.mesh import Axis
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.quantized import coded_weights


class _Batch(NamedTuple):
    batch: Any
    number: int
    random: dict[str, Any] | None


class Found(NamedTuple):
    """Result of a search.

    Args:
        batch: Number of the batch in the epoch that gave the first bad number; None if none did when it ran again.
        places: First bad place of each rank where there is one, by rank.
    """

    batch: int | None
    places: dict[int, Place]


class Counters:
    """Copies of what a forward pass of a module counts: loads of experts, calls of noise, and all its buffers."""

    def __init__(self, root: nn.Module) -> None:
        self._layers = [m for m in root.modules() if isinstance(m, MoELayer)]
        coded = {(id(m), leaf) for _, m, leaf in coded_weights(root)}  # frozen, and large
        self._slots: list[tuple[nn.Module, str]] = [
            (m, name)
            for m in root.modules()
            for name, b in m.named_buffers(recurse=False)
            if b is not None and (id(m), name) not in coded
        ]
        self._slots += [(layer, name) for layer in self._layers for name in ("load_E", "dropped")]
        self._saved: list[Tensor] = []
        self._copies: list[Any] = []

    @torch.no_grad()
    def save(self) -> None:
        """Copies the counters."""
        now = self._now()
        if [t.shape for t in now] == [t.shape for t in self._saved]:
            for mine, theirs in zip(self._saved, now, strict=True):
                mine.copy_(theirs)
        else:
            self._saved = [t.clone() for t in now]
        self._copies = [replace(layer.copies) for layer in self._layers]

    @torch.no_grad()
    def restore(self) -> None:
        """Sets the counters to what they were when they were saved."""
        for now, saved in zip(self._now(), self._saved, strict=True):
            now.copy_(saved)
        for layer, copies in zip(self._layers, self._copies, strict=True):
            for field in fields(copies):
                setattr(layer.copies, field.name, getattr(copies, field.name))

    def _now(self) -> list[Tensor]:
        return [getattr(owner, name) for owner, name in self._slots]


class Replay:
    """The batches of the optimizer step under way in a fit, which are run again if it fails and ``searches`` is true."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, searches: bool) -> None:
        self._trainer, self._module = trainer, module
        takes_batches = not is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)
        #: Whether the batches can be run again.
        self.searches = searches and module.automatic_optimization and takes_batches
        self._counters = Counters(module)
        self._batches: list[_Batch] = []

    @property
    def batches(self) -> list[tuple[Any, int]]:
        """The batches of the step on this rank, with their numbers in the epoch."""
        return [(held.batch, held.number) for held in self._batches]

    def begin(self, batch: Any, index: int) -> None:
        """Notes a batch before it is trained on."""
        if not self._batches:
            self._counters.save()
        random = _collect_rng_states() if self.searches else None
        self._batches.append(_Batch(batch, index, random))

    def end(self) -> None:
        """Forgets the batches after the step."""
        self._batches.clear()

    def take_back(self) -> None:
        """Undoes what the batches have counted, and drops all gradients."""
        self._counters.restore()
        for parameter in self._module.parameters():
            parameter.grad = None

    def search(self, world: Axis) -> Found:
        """Runs the batches again, forward and backward, until one gives a bad number on any rank. Collective.

        Random numbers are those of the first time. What the module logs is dropped, and its metrics stay as they are.
        """
        staged = self._trainer.strategy.fold.pp > 1  # type: ignore[attr-defined]
        random = _collect_rng_states()
        try:
            with _silenced(self._module):
                for held in self._batches:
                    if held.random is not None:
                        _set_rng_states(held.random)
                    place = self._run(held)
                    self.take_back()
                    everyone = comm.all_gather_objects(place, world)
                    places: dict[int, Place] = {rank: at for rank, at in enumerate(everyone) if at is not None}
                    if places:
                        first = min(found.key(staged) for found in places.values())
                        return Found(
                            held.number, {r: found for r, found in places.items() if found.key(staged) == first}
                        )
        finally:
            _set_rng_states(random)
        return Found(None, {})

    def _run(self, held: _Batch) -> Place | None:
        module, strategy = self._module, self._trainer.strategy
        precision = strategy.precision_plugin
        with watching(module) as search:
            with precision.train_step_context():
                if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
                    output = module.training_step(held.batch, held.number)
                else:
                    output = module.training_step(held.batch)
            loss = output.get("loss") if isinstance(output, dict) else output
            if isinstance(loss, Tensor) and loss.requires_grad:
                check, precision.step_check = precision.step_check, None  # type: ignore[attr-defined]
                try:
                    precision.backward(loss, module, None)
                finally:
                    precision.step_check = check  # type: ignore[attr-defined]
        if search.place is None and isinstance(loss, Tensor) and not bool(loss.detach().isfinite().all()):
            return Place("loss", "training_step")
        return search.place


@contextmanager
def _silenced(module: pl.LightningModule) -> Iterator[None]:
    """A context in which the module logs nothing, and after which its metrics are as before."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    kept = [(m._copy_state_dict(), m._update_count, m._computed) for m in metrics]
    for name in ("log", "log_dict"):
        module.__dict__[name] = _ignore
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        for metric, (state, count, computed) in zip(metrics, kept, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, computed


def _ignore(*_: Any, **__: Any) -> None:
    """Takes the place of ``log``."""
