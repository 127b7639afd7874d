# SPDX-License-Identifier: Apache-2.0
"""FoldSummary: prints a model's parameters and how a fold spreads them, from layouts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family, ParameterLayout, ParameterPlan
from lightning_moefold.mesh import Axis
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules import Attention, GatedMLP, MoELayer, RMSNorm, Router
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.modules.experts.experts import RoutedExperts
from lightning_moefold.modules.quantization import BITS
from lightning_moefold.modules.vocabulary import VocabularyEmbedding, VocabularyHead
from lightning_moefold.strategy import MoEFoldStrategy

if TYPE_CHECKING:
    from rich.console import Console

_ORDER = (
    "embedding",
    "attention",
    "router",
    "experts",
    "shared expert",
    "dense feed-forward",
    "norms",
    "head",
    "other",
)
#: Kind of the parameters in modules of a type and below them, unless a module further down has another kind.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((RoutedExperts,), "experts"),
    ((Router,), "router"),
    ((MoELayer,), "shared expert"),  # parameters that are neither router nor experts
    ((GatedMLP,), "dense feed-forward"),
    ((Attention, nn.MultiheadAttention), "attention"),
    ((RMSNorm, nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, _BatchNorm), "norms"),
    ((VocabularyEmbedding, nn.Embedding), "embedding"),
    ((VocabularyHead,), "head"),
)
#: Number of tensors of the parameter's size that an optimizer keeps; its first base class here counts.
_STATES: dict[type[Optimizer], int] = {
    torch.optim.Adam: 2,
    torch.optim.NAdam: 2,
    torch.optim.RAdam: 2,
    torch.optim.Adamax: 2,
    torch.optim.SGD: 0,
}
#: Units of numbers and of bytes: 10^9, 10^6, 10^3, one.
_NUMBERS, _BYTES = ("B", "M", "K", ""), ("GB", "MB", "kB", "B")


@dataclass
class Size:
    """Numbers of parameters of one group.

    Args:
        total: Number in the whole model.
        active: Number of those that a token uses.
        trainable: Number of those with a gradient.
        per_rank: Number stored by each rank.
    """

    total: int = 0
    active: float = 0.0
    trainable: int = 0
    per_rank: Counter[int] = field(default_factory=Counter)

    def add(self, entry: Entry, per_rank: Counter[int]) -> None:
        """Adds a parameter that ranks store in these numbers."""
        number = prod(entry.layout.shape)
        self.total += number
        self.active += number * entry.active
        self.trainable += number * entry.trainable
        self.per_rank.update(per_rank)


@dataclass
class ModelSummary:
    """Sizes of a LightningModule under a fold.

    Args:
        fold: The fold.
        groups: Size by group: each kind of module, then each family, then ``"total"``.
        weight_bytes: Bytes of the parameters that each rank stores.
        gradient_bytes: Bytes of the trainable ones among them.
    """

    fold: Fold
    groups: dict[str, Size]
    weight_bytes: Counter[int]
    gradient_bytes: Counter[int]

    @property
    def total(self) -> Size:
        """Size of all parameters together."""
        return self.groups["total"]

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the rows of the table: name, total, active, trainable, frozen, per rank."""
        rows = []
        for name, size in self.groups.items():
            numbers = (size.total, round(size.active), size.trainable, size.total - size.trainable)
            rows.append((name, *(_range(n, n) for n in numbers), _range(*self.size_range(name))))
        return rows

    def size_range(self, name: str = "total") -> tuple[int, int]:
        """Returns the fewest and most parameters of a group that a rank stores."""
        stored = [self.groups[name].per_rank[rank] for rank in range(self.fold.world_size)]
        return min(stored), max(stored)

    def memory(self, optimizer: Optimizer | None = None) -> dict[str, tuple[int, int]]:
        """Returns the fewest and most bytes that a rank keeps between steps: weights, gradients, optimizer states, and their sum.

        Gathered weights and activations are not included. An optimizer whose states are unknown is left out.
        """
        ranks = range(self.fold.world_size)
        parts = {
            "weights": [self.weight_bytes[rank] for rank in ranks],
            "gradients": [self.gradient_bytes[rank] for rank in ranks],
        }
        if (known := _optimizer_states(optimizer)) is not None:
            parts[f"{known[0]} states"] = [known[1] * self.gradient_bytes[rank] for rank in ranks]
        parts["together"] = [sum(sizes) for sizes in zip(*parts.values(), strict=True)]
        return {name: (min(sizes), max(sizes)) for name, sizes in parts.items()}

    def memory_text(self, optimizer: Optimizer | None = None) -> str:
        """:meth:`memory` in a sentence."""
        parts = {name: _range(*sizes, _BYTES) for name, sizes in self.memory(optimizer).items()}
        together = parts.pop("together")
        summands = " + ".join(f"{name} {sizes}" for name, sizes in parts.items())
        return f"kept by each rank: {summands} = {together}\n(gathered weights and activations come on top)"

    def text(self) -> str:
        """Returns the table as plain text."""
        table = [_HEAD, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        return "\n".join([f"Fold {self.fold}", lines[0], "-" * len(lines[0]), *lines[1:]])


_HEAD = ("parameters", "total", "active", "trainable", "frozen", "per rank")


@dataclass(frozen=True)
class Entry:
    """One parameter: its layout, its kind, the share of it that a token uses, whether it is trained, and bytes per element."""

    layout: ParameterLayout
    kind: str
    active: float
    trainable: bool
    element_size: float


def summarize_model(module: nn.Module, fold: Fold, pp: Axis | None = None) -> ModelSummary:
    """Counts the parameters of a module under ``fold``. Collective over ``pp`` if it is given.

    Args:
        module: Usually a LightningModule. Parameters of language models and blocks have layouts; every rank stores all
            other parameters.
        fold: The fold under which the module has been parallelised, or any fold if it has not.
        pp: The ranks that hold the other stages of the model; None counts the parameters that are here.
    """
    entries = _entries(module)
    parts = [entries] if pp is None else comm.all_gather_objects(entries, pp)
    whole = {name: entry for part in parts for name, entry in part.items()}  # two stages hold a tied embedding
    kinds: dict[str, Size] = defaultdict(Size)
    families: dict[str, Size] = defaultdict(Size)
    total, weight_bytes, gradient_bytes = Size(), Counter[int](), Counter[int]()
    stored: dict[ParameterLayout, Counter[int]] = {}  # layers repeat, and there may be thousands of ranks
    for entry in whole.values():
        layout = entry.layout
        if layout not in stored:
            stored[layout] = Counter({rank: layout.stored_box(fold, rank).numel for rank in range(fold.world_size)})
        # A model that has not been parallelised has no families in its layouts yet.
        family = Family.EXPERT if entry.kind == "experts" else layout.plan.family
        for size in (kinds[entry.kind], families[family.value], total):
            size.add(entry, stored[layout])
        for rank, number in stored[layout].items():
            weight_bytes[rank] += int(number * entry.element_size)
            gradient_bytes[rank] += int(number * entry.element_size) * entry.trainable
    groups = {kind: kinds[kind] for kind in _ORDER if kind in kinds}
    groups |= {f"{f.value} family": families[f.value] for f in Family if f.value in families}
    return ModelSummary(fold, groups | {"total": total}, weight_bytes, gradient_bytes)


def _entries(module: nn.Module) -> dict[str, Entry]:
    layouts: dict[int, ParameterLayout] = {}  # by id, because a part of a model may have a second name
    for _, root in parallel_roots(module):
        root.release_gathered_weights()
        layouts |= {id(p): root.layouts[name] for name, p in root.named_parameters() if name in root.layouts}
    roles, entries = _roles_of(module), {}
    for name, parameter in module.named_parameters():
        layout = layouts.get(id(parameter)) or ParameterLayout(tuple(parameter.shape), ParameterPlan())
        role = roles[name.rpartition(".")[0]]
        entries[name] = Entry(layout, *role, parameter.requires_grad, parameter.element_size())
    for prefix, model in parallel_roots(module):
        if isinstance(model, MoECausalLM) and model.quantized is not None:
            for inner, layout in model.coded_layouts.items():
                name = f"{prefix}.{inner}".lstrip(".")
                entries[name] = Entry(layout, *roles[name.rpartition(".")[0]], False, BITS[model.quantized] / 8)
    return entries


def _roles_of(root: nn.Module) -> dict[str, tuple[str, float]]:
    """Returns the kind of each module's own parameters, and the share of them that is active for a token."""
    roles: dict[str, tuple[str, float]] = {}
    for name, module in root.named_modules(remove_duplicate=False):  # parents first
        around, active = roles.get(name.rpartition(".")[0], ("other", 1.0))
        kind = next((kind for types, kind in _KINDS if isinstance(module, types)), around)
        if around == "experts" or (isinstance(module, GatedMLP) and around == "shared expert"):
            kind = around
        if isinstance(module, MoELayer):
            roles[f"{name}.experts".lstrip(".")] = "experts", module.top_k / module.num_experts
        roles.setdefault(name, (kind, active))
    return roles


def _optimizer_states(optimizer: Optimizer | None) -> tuple[str, int] | None:
    """Returns an optimizer's name and how many tensors it keeps per parameter; None if that is unknown."""
    for kind, states in _STATES.items():
        if isinstance(optimizer, kind):
            defaults, sgd = optimizer.defaults, kind is torch.optim.SGD
            return kind.__name__, states + bool(defaults.get("amsgrad")) + bool(sgd and defaults.get("momentum"))
    return None


def _range(low: int, high: int, units: Sequence[str] = _NUMBERS) -> str:
    """Formats one or two numbers with three or more significant digits: 999, 12.3 K, 46.70 B."""
    shown = []
    for number in (low, high):
        unit, size = next(((u, s) for u, s in zip(units, (1e9, 1e6, 1e3), strict=False) if number >= s), (units[-1], 1))
        shown.append((f"{number} {unit}" if size == 1 else f"{number / size:.2f} {unit}").rstrip())
    return " .. ".join(dict.fromkeys(shown))


class FoldSummary(pl.Callback):
    """Prints once, at the start of a fit and on rank zero, how large the model is and how the fold spreads it.

    For each kind of module and each family it prints the parameters in total, active per token, trainable, frozen, and
    the fewest and most that a rank stores; then the memory of weights, gradients and optimizer states per rank. Turn
    Lightning's own summary off with ``Trainer(enable_model_summary=False)``. The table uses rich if that is installed.

    Loggers get the fold and the totals as hyperparameters (``fold``, ``ranks``, ``parameters``, ``active_parameters``,
    ``trainable_parameters``), and a WandbLogger gets the table as ``fold``.
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy, optimizers = trainer.strategy, trainer.optimizers
        # Under another strategy every rank is assumed to hold the whole model.
        fold, pp = (
            (strategy.fold, strategy.mesh.axis("pp")) if isinstance(strategy, MoEFoldStrategy) else (Fold(1), None)
        )
        summary = summarize_model(pl_module, fold, pp)
        self._print(summary, optimizers[0] if len(optimizers) == 1 else None)
        total = summary.total
        totals = {
            "parameters": total.total,
            "active_parameters": round(total.active),
            "trainable_parameters": total.trainable,
        }
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams({"fold": str(fold), "ranks": trainer.world_size, **totals})
            except Exception as error:  # a rank that raises alone would leave the others waiting
                # MLflow refuses other values than those that a resumed run has, and a run may resume under another fold.
                reason = " ".join(str(error).split())[:200]
                rank_zero_warn(f"{type(logger).__name__} did not take the fold {fold} ({reason}).")
            if isinstance(logger, WandbLogger):
                logger.log_table("fold", list(_HEAD), [list(row) for row in summary.rows()])

    @rank_zero_only
    def _print(self, summary: ModelSummary, optimizer: Optimizer | None) -> None:
        console: Console | None = None
        with suppress(ImportError):
            from rich import console as rich_console

            console = rich_console.Console()
        if console is not None and (console.is_terminal or console.is_jupyter):
            _print_rich(summary, console)
        else:  # rich assumes that a file has 80 columns, and would cut numbers off
            print(summary.text())
        print(summary.memory_text(optimizer))


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
