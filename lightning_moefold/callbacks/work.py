# SPDX-License-Identifier: Apache-2.0
"""What a batch asks of a model: tokens and model FLOPs. Never waits for the device before log time.

Model FLOPs are those of forward and backward (three times forward: backward makes two products for each one of
forward), without anything recomputed, as in PaLM (arXiv 2204.02311, appendix B). Only the experts a token visits count.

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

from lightning_moefold.models import MoECausalLM

BACKWARD_AND_FORWARD = 3
UNKNOWN = float("nan")

TokenCount: TypeAlias = Callable[[Any], tuple[int, int]]
"""From a batch to its rows and their length."""


@dataclass(frozen=True)
class BatchShape:
    """Rows of a batch on this rank.

    Args:
        rows: B; 0 where it is not known.
        length: Tokens of each row.
        length_B: Tokens of each row on the device where rows are padded, else None.
        flops: Model FLOPs of the batch where the module states them, else None.
    """

    rows: int
    length: int
    length_B: Tensor | None = None
    flops: float | None = None

    def rows_by_length(self) -> Mapping[int, int]:
        """How many rows there are of each length. Waits for the device if rows are padded."""
        if self.length_B is None:
            return {self.length: self.rows}
        return Counter(int(n) for n in self.length_B.tolist())


def read_shape(batch: Any, token_count_fn: TokenCount | None, count_padding: bool) -> BatchShape | None:
    """Shape of a batch, or None where nothing is known about it.

    Args:
        batch: As the DataLoader gave it; a mapping with ``input_ids`` ``[B, S]`` unless there is a ``token_count_fn``.
        token_count_fn: Tells rows and length.
        count_padding: Count the positions that ``attention_mask`` ``[B, S]`` excludes.
    """
    if token_count_fn is not None:
        return BatchShape(*token_count_fn(batch))
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    mask = batch.get("attention_mask")
    masked = isinstance(mask, Tensor) and mask.shape == ids.shape and not count_padding
    return BatchShape(ids.shape[0], ids.shape[1], mask.bool().sum(1) if masked else None)


class WorkModel:
    """Counts tokens and model FLOPs for one LightningModule.

    FLOPs come from the module's attribute ``flops_per_batch`` (a number: of this rank's batch, as in Lightning's
    ThroughputMonitor), else from its ``flops_per_token`` (a number, or a function of the row's length), both for
    forward and backward together; else from its :class:`~lightning_moefold.MoECausalLM`, if it has exactly one.

    Args:
        module: The LightningModule.
        token_count_fn: Tells rows and length of a batch.
        count_padding: Whether padding counts.
    """

    def __init__(self, module: pl.LightningModule, token_count_fn: TokenCount | None, count_padding: bool) -> None:
        self.module, self.token_count_fn, self.count_padding = module, token_count_fn, count_padding
        self._flops_per_token = _flops_per_token(module)
        # Asked once: a look-up that fails is slow in a Module.
        self._states_flops = getattr(module, "flops_per_batch", None) is not None

    @property
    def knows_flops(self) -> bool:
        """Whether model FLOPs can be told."""
        return self._flops_per_token is not None or self._states_flops

    def read(self, batch: Any) -> BatchShape | None:
        """What is to be remembered of a batch."""
        shape = read_shape(batch, self.token_count_fn, self.count_padding)
        if not self._states_flops:
            return shape
        flops: Any = self.module.flops_per_batch
        return replace(shape or BatchShape(0, 0), flops=float(flops))

    def count(self, shapes: Iterable[BatchShape | None]) -> tuple[float, float]:
        """Tokens and model FLOPs of batches; NaN where not known. Waits for the device if rows are padded."""
        tokens = flops = 0.0
        for shape in shapes:
            if shape is None:
                return UNKNOWN, UNKNOWN
            by_length = shape.rows_by_length()
            tokens += sum(rows * length for length, rows in by_length.items()) if shape.rows else UNKNOWN
            flops += self._flops(by_length) if shape.flops is None else shape.flops
        return tokens, flops

    def _flops(self, rows_by_length: Mapping[int, int]) -> float:
        if self._flops_per_token is None:
            return UNKNOWN
        return sum(rows * length * self._flops_per_token(length) for length, rows in rows_by_length.items() if length)


def _flops_per_token(module: pl.LightningModule) -> Callable[[int], float] | None:
    stated = getattr(module, "flops_per_token", None)
    if stated is not None:
        return stated if callable(stated) else lambda _: float(stated)
    models = [m for m in module.modules() if isinstance(m, MoECausalLM)]
    if len(models) != 1:
        return None
    config = models[0].config
    # Cached: the sum over layers is asked for again with every batch.
    return lru_cache(maxsize=4096)(lambda length: BACKWARD_AND_FORWARD * config.forward_flops_per_token(length))
