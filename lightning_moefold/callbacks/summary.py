# SPDX-License-Identifier: Apache-2.0
"""FoldSummary: what a model is made of, and how a fold spreads it. Sizes come from layouts, without communication."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family, ParameterLayout, ParameterPlan
from lightning_moefold.models import MoECausalLM
from lightning_moefold.strategy import MoEFoldStrategy

if TYPE_CHECKING:
    from rich.console import Console

_OTHER = "other"
#: Kinds of parameters by name, in the order of the table; the first pattern that is found counts.
_KINDS = (
    ("norms", r"norm\.(weight|bias)$"),
    ("embedding", r"(^|\.)embed_tokens\."),
    ("attention", r"\.self_attn\."),
    ("router", r"\.mlp\.gate\."),
    ("experts", r"\.mlp\.experts\."),
    ("shared expert", r"\.mlp\.shared_expert"),
    ("dense feed-forward", r"\.mlp\."),
    ("head", r"(^|\.)lm_head\."),
)
_ORDER = ("embedding", "attention", "router", "experts", "shared expert", "dense feed-forward", "norms", "head", _OTHER)


@dataclass
class Size:
    """Number of parameters of one group.

    Args:
        total: In the whole model.
        active: Of those a token passes through.
        trainable: With a gradient.
        per_rank: Stored by each rank.
    """

    total: int = 0
    active: float = 0.0
    trainable: int = 0
    per_rank: Counter[int] = field(default_factory=Counter)

    def range(self, world_size: int) -> tuple[int, int]:
        """Fewest and most parameters that a rank stores."""
        stored = [self.per_rank[rank] for rank in range(world_size)]
        return min(stored), max(stored)


@dataclass
class ModelSummary:
    """Sizes of a LightningModule under a fold.

    Args:
        fold: The fold.
        groups: Sizes by name: each kind of module, then each family, then ``"total"``.
    """

    fold: Fold
    groups: dict[str, Size]

    @property
    def total(self) -> Size:
        """Of all parameters."""
        return self.groups["total"]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: name, total, active, trainable, frozen, and per rank."""
        rows = []
        for name, size in self.groups.items():
            low, high = self.size_range(name)
            stored = _compact(high) if low == high else f"{_compact(low)} .. {_compact(high)}"
            frozen = size.total - size.trainable
            numbers = (size.total, round(size.active), size.trainable, frozen)
            rows.append((name, *(_compact(n) for n in numbers), stored))
        return rows

    def size_range(self, name: str = "total") -> tuple[int, int]:
        """Fewest and most parameters of a group that a rank stores."""
        return self.groups[name].range(self.fold.world_size)

    def text(self) -> str:
        """The table as plain text."""
        table = [_HEAD, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        return "\n".join([f"Fold {self.fold}", lines[0], "-" * len(lines[0]), *lines[1:]])


_HEAD = ("parameters", "total", "active", "trainable", "frozen", "per rank")


def summarize_model(module: pl.LightningModule, fold: Fold) -> ModelSummary:
    """Counts the parameters of a module that has been parallelised under ``fold``. Local.

    Parameters outside a :class:`~lightning_moefold.MoECausalLM` are the user's own: every rank stores them.
    """
    layouts: dict[str, tuple[ParameterLayout, float]] = {}
    for prefix, model in module.named_modules():
        if isinstance(model, MoECausalLM):
            share = model.config.num_experts_per_tok / model.config.num_experts
            layouts |= {f"{prefix}.{name}".lstrip("."): (layout, share) for name, layout in model.layouts.items()}
    kinds: dict[str, Size] = defaultdict(Size)
    families: dict[str, Size] = defaultdict(Size)
    total = Size()
    stored: dict[ParameterLayout, Counter[int]] = {}  # layers repeat, and there may be thousands of ranks
    for name, parameter in module.named_parameters():
        layout, share = layouts.get(name, (ParameterLayout(tuple(parameter.shape), ParameterPlan()), 1.0))
        if layout not in stored:
            stored[layout] = Counter({rank: layout.box(fold, rank).numel for rank in range(fold.world_size)})
        kind = _kind(name) if name in layouts else _OTHER
        # A model that no fold has touched has no families in its layouts yet.
        family = Family.EXPERT if kind == "experts" else layout.plan.family
        for size in (kinds[kind], families[family.value], total):
            _add(size, layout, share if kind == "experts" else 1.0, parameter.requires_grad, stored[layout])
    groups = {kind: kinds[kind] for kind in _ORDER if kind in kinds}
    groups |= {f"{f.value} family": families[f.value] for f in Family if f.value in families}
    return ModelSummary(fold, groups | {"total": total})


def _add(size: Size, layout: ParameterLayout, active: float, trainable: bool, per_rank: Counter[int]) -> None:
    number = 1
    for length in layout.shape:
        number *= length
    size.total += number
    size.active += number * active
    size.trainable += number if trainable else 0
    size.per_rank.update(per_rank)


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), _OTHER)


def _compact(number: int) -> str:
    """Three or more significant digits: 999, 12.3 K, 46.70 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


class FoldSummary(pl.Callback):
    """Prints once, at the start of a fit and on rank zero, how large the model is and how the fold spreads it.

    By kind of module and by family: parameters in total, active for a token, trainable, frozen, and the fewest and most
    that a rank stores. Turn Lightning's own off with ``Trainer(enable_model_summary=False)``. Printed with rich where
    that is installed.
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        # Under another strategy every rank is taken to hold everything.
        fold = strategy.fold if isinstance(strategy, MoEFoldStrategy) else Fold(1)
        self._print(pl_module, fold)

    @rank_zero_only
    def _print(self, pl_module: pl.LightningModule, fold: Fold) -> None:
        summary = summarize_model(pl_module, fold)
        try:
            from rich.console import Console
        except ImportError:
            print(summary.text())
            return
        console = Console()
        if console.is_terminal or console.is_jupyter:
            _print_rich(summary, console)
        else:  # rich takes a file for 80 columns wide, and cuts numbers off
            print(summary.text())


def _print_rich(summary: ModelSummary, console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"Fold {summary.fold}", title_justify="left")
    for i, column in enumerate(_HEAD):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    rows = summary.rows()
    for i, row in enumerate(rows):
        last_kind = i + 1 < len(rows) and rows[i + 1][0].endswith("family") and not row[0].endswith("family")
        table.add_row(*row, end_section=last_kind or i == len(rows) - 2)
    console.print(table)
