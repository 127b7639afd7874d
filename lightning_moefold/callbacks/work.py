# SPDX-License-Identifier: Apache-2.0
"""Counts the work of a batch: tokens, model FLOPs and hardware FLOPs. Waits for the device only at log time.

Model FLOPs are those of forward and backward (three times forward: backward makes two products for each one of
forward), without anything recomputed, as in PaLM (arXiv 2204.02311, appendix B), and without the gradients that frozen parameters
make unnecessary. Only the experts a token visits count, and an adapter's own products do. Hardware FLOPs also count what is
recomputed in backward.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import lightning.pytorch as pl
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.callbacks.freezing import Savings
from lightning_moefold.mesh import Axis
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules.recompute_parts import recompute_parts

BACKWARD_AND_FORWARD = 3
UNKNOWN = float("nan")

TokenCount: TypeAlias = Callable[[Any], tuple[int, int]]
"""Function that maps a batch to its number of rows and their length."""


@dataclass(frozen=True)
class BatchShape:
    """Shape of a batch on this rank.

    Args:
        rows: Number of rows, B; 0 if unknown.
        length: Number of tokens per row.
        length_B: Number of tokens of each row, on the device, if rows are padded; otherwise None.
        flops: Model FLOPs of the batch if the module states them; otherwise None.
    """

    rows: int
    length: int
    length_B: Tensor | None = None
    flops: float | None = None

    def rows_by_length(self) -> Mapping[int, int]:
        """Returns the number of rows of each length. Waits for the device if rows are padded."""
        if self.length_B is None:
            return {self.length: self.rows}
        return Counter(int(n) for n in self.length_B.tolist())


@dataclass(frozen=True)
class Work:
    """Work of several batches on this rank; NaN if unknown.

    Args:
        tokens: Number of tokens.
        flops: Model FLOPs.
        hardware_flops: Hardware FLOPs; the model FLOPs if nothing else is known.
    """

    tokens: float
    flops: float
    hardware_flops: float


class WorkModel:
    """Counts tokens and FLOPs for one LightningModule.

    FLOPs come from the module's attribute ``flops_per_batch`` (a number for this rank's batch, as in Lightning's
    ThroughputMonitor), otherwise from its ``flops_per_token`` (a number, or a function of the row's length); both cover
    forward and backward together. Otherwise they come from its :class:`~lightning_moefold.MoECausalLM`, if it has
    exactly one.

    Args:
        module: The LightningModule.
        token_count_fn: Function that returns rows and length of a batch.
        count_padding: Whether padding counts.
    """

    def __init__(self, module: pl.LightningModule, token_count_fn: TokenCount | None, count_padding: bool) -> None:
        self.module, self.token_count_fn, self.count_padding = module, token_count_fn, count_padding
        models = [m for m in module.modules() if isinstance(m, MoECausalLM)]
        self._model = models[0] if len(models) == 1 else None
        self._stated = getattr(module, "flops_per_token", None)
        #: Frozen parameters of this rank that the other pipeline stages know of, and those of all stages.
        self._shared: frozenset[str] | None = None
        self._elsewhere: frozenset[str] = frozenset()
        # Read once, because a failing look-up is slow in a Module.
        self._states_flops = getattr(module, "flops_per_batch", None) is not None
        # Cached, because every batch needs the sum over layers again.
        self._per_token = lru_cache(maxsize=4096)(self._flops_per_token)
        self._savings = lru_cache(maxsize=2)(self._savings_of)

    @property
    def knows_flops(self) -> bool:
        """Whether model FLOPs are known."""
        return self._states_flops or self._stated is not None or self._model is not None

    def read(self, batch: Any) -> BatchShape | None:
        """Returns the shape of a batch, to be counted later; None if it is unknown."""
        shape = self._shape(batch)
        if not self._states_flops:
            return shape
        flops: Any = self.module.flops_per_batch
        return replace(shape or BatchShape(0, 0), flops=float(flops))

    def _shape(self, batch: Any) -> BatchShape | None:
        if self.token_count_fn is not None:
            return BatchShape(*self.token_count_fn(batch))
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        mask = batch.get("attention_mask")
        masked = isinstance(mask, Tensor) and mask.shape == ids.shape and not self.count_padding
        return BatchShape(ids.shape[0], ids.shape[1], mask.bool().sum(1) if masked else None)

    def count(self, shapes: Iterable[BatchShape | None]) -> Work:
        """Counts the work of batches. Waits for the device if rows are padded."""
        tokens = flops = hardware = 0.0
        frozen = self._frozen()
        for shape in shapes:
            if shape is None:
                return Work(UNKNOWN, UNKNOWN, UNKNOWN)
            by_length = shape.rows_by_length()
            tokens += sum(rows * length for length, rows in by_length.items()) if shape.rows else UNKNOWN
            if shape.flops is not None:
                flops, hardware = flops + shape.flops, hardware + shape.flops
                continue
            for length, rows in by_length.items():
                per_token = self._per_token(length, frozen) if length else (0.0, 0.0)
                flops += rows * length * per_token[0]
                hardware += rows * length * per_token[1]
        return Work(tokens, flops, hardware)

    def share_frozen(self, world: Axis) -> None:
        """Exchanges which parameters are frozen on other pipeline stages. Collective if the model has stages."""
        if self._model is None or self._model.pipeline is None:
            return
        found = comm.all_gather_objects(self._frozen_here(), world)
        self._shared, self._elsewhere = found[world.index], frozenset().union(*found)

    @property
    def frozen_has_changed(self) -> bool:
        """Whether this rank has frozen or unfrozen parameters since the last exchange."""
        return self._shared is not None and self._shared != self._frozen_here()

    def _frozen(self) -> frozenset[str]:
        return self._elsewhere | self._frozen_here()

    def _frozen_here(self) -> frozenset[str]:
        if self._model is None:
            return frozenset()
        frozen = (name for name, p in self._model.named_parameters() if not p.requires_grad)
        return frozenset((*frozen, *self._model.coded_layouts))

    def _savings_of(self, frozen: frozenset[str], parts: frozenset[str]) -> Savings:
        assert self._model is not None
        adapter = self._model.adapter
        return Savings(self._model.config, frozen, parts, {} if adapter is None else adapter.shapes)

    def _flops_per_token(self, length: int, frozen: frozenset[str]) -> tuple[float, float]:
        """Returns model and hardware FLOPs of a token in a row of ``length``."""
        if self._stated is not None:
            flops = float(self._stated(length) if callable(self._stated) else self._stated)
            return flops, flops
        if self._model is None:
            return UNKNOWN, UNKNOWN
        config = self._model.config
        flops = BACKWARD_AND_FORWARD * config.forward_flops_per_token(length)
        layer: Any = next(iter(self._model.model.layers.values()))  # all recompute the same
        parts = recompute_parts(layer.recompute)
        hardware = flops - self._savings(frozen, parts).per_token(length)
        return flops - self._savings(frozen, frozenset()).per_token(length), hardware
