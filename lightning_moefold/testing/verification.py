# SPDX-License-Identifier: Apache-2.0
"""Verifies on a user's checkpoint that a fold computes the same training run as one process.

``moefold verify`` starts CPU ranks, trains a few steps on random tokens in float64 under the fold, trains the same in one
process with Hugging Face's code, and compares the losses, every gradient, the gradient norms and the weights at the end.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold.arguments import check_count
from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.errors import ConfigError, InputError
from lightning_moefold.fold import Fold
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.strategy import MoEFoldStrategy
from lightning_moefold.testing.batches import make_batches
from lightning_moefold.testing.compare import relative_error
from lightning_moefold.testing.environment import PoolEnvironment
from lightning_moefold.testing.oracle import reference_run
from lightning_moefold.testing.pieces import Piece, assemble, owned_pieces
from lightning_moefold.testing.pool import RankPool

TOLERANCE = 1e-9
"""Largest relative error in float64: what a different order of summation leaves, with some orders of magnitude to spare."""


@dataclass
class RankRecord:
    """Losses, gradients, norms and weights recorded on one rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Piece]] = field(default_factory=list)
    weights: dict[str, Piece] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Args:
        what: Description of the compared values.
        error: Largest relative error.
        where: The tensor or step with the largest error.
    """

    what: str
    error: float
    where: str

    @property
    def holds(self) -> bool:
        """Whether the error is within :data:`TOLERANCE`."""
        return self.error < TOLERANCE


class _Module(pl.LightningModule):
    def __init__(self, path: str, overrides: dict[str, Any], record: RankRecord) -> None:
        super().__init__()
        self.path, self.overrides, self.record = path, overrides, record
        self.model: MoECausalLM | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_pretrained(self.path, **self.overrides)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        assert self.model is not None
        loss = self.model(**batch).loss
        assert loss is not None
        self.record.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.model is not None
        self.record.grads.append(owned_pieces(self.model, "grad"))

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        self.record.norms.append(float(self.trainer.precision_plugin.grad_norm))  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def train_on_rank(
    path: str, overrides: dict[str, Any], batches: list[list[dict[str, Tensor]]], arguments: dict[str, Any]
) -> RankRecord:
    """Trains on ``batches[step][data rank]`` on this rank of a pool; ``arguments`` are those of the strategy."""
    record = RankRecord()
    module = _Module(path, overrides, record)
    world, rank = dist.get_world_size(), dist.get_rank()
    place = Fold.parse(arguments["fold"], world).coordinates(rank)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=MoEFoldStrategy(**arguments), plugins=[PoolEnvironment()],
        precision="64-true", max_epochs=1, gradient_clip_val=0.5, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    mine: Any = [step[place["dp"]] for step in batches]
    trainer.fit(module, DataLoader(mine, batch_size=None))
    assert module.model is not None
    record.weights = owned_pieces(module.model)
    return record


def verify(
    path: str | Path,
    fold: str,
    ranks: int,
    *,
    layers: int | None = None,
    steps: int = 2,
    rows: int | None = None,
    length: int = 16,
    seed: int = 0,
    strategy: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Compares a fold with one process, on this machine's CPU.

    Both keep the model in float64 with gradients and AdamW state (32 bytes per parameter). If that is too much, shorten
    the model with ``layers``.

    Args:
        path: Directory in Hugging Face format.
        fold: Text of the fold, such as ``"tp2 | ep4"``.
        ranks: Number of ranks of the fold.
        layers: Number of first layers of the model to use; None for all.
        steps: Number of optimizer steps.
        rows: Number of rows of each data rank; by default two per micro-batch.
        length: Number of tokens of a row.
        seed: Seed of the random tokens.
        strategy: Further arguments of :class:`~lightning_moefold.MoEFoldStrategy`.

    Returns:
        One finding each for the losses, the gradients of each step, the norms and the weights.

    Raises:
        FoldError: If the fold does not fit the ranks or the model.
        InputError: For another argument that cannot be honoured; before ranks are started.
        ConfigError: If ``transformers`` does not have the model's routers or their losses.
        RankError: If a rank failed.
    """
    path = local_directory(path)
    arguments = {**(strategy or {}), "fold": fold}
    microbatches = arguments.get("num_microbatches") or 1
    parsed = Fold.parse(fold, ranks)
    for name, value in {"steps": steps, "length": length}.items():
        check_count(name, value)
    MoEFoldStrategy(**arguments).settings.check_pipeline(parsed.pp)
    overrides: dict[str, Any] = {"output_router_logits": True}
    if layers is not None:
        with tempfile.TemporaryDirectory() as folder:
            _copy_layers(Path(path), layers, Path(folder))
            return verify(
                folder, fold, ranks, steps=steps, rows=rows, length=length, seed=seed, strategy=strategy
            )  # fmt: skip
    config = MoEConfig.from_pretrained(path, **overrides)
    parsed.validate(config)
    if config.is_packed:
        raise ConfigError(
            f"{path} is packed, which transformers does not know; verify what moefold camera unpack makes of it."
        )
    if config.router.changes_training or config.aux_loss != "huggingface" or config.wants_z_loss:
        raise ConfigError(
            f"{path} has routers or losses of routers that transformers does not know, so there is nothing to compare with; "
            "take router, aux_loss and router_z_loss_coef out of a copy of its config.json."
        )
    rows = rows or 2 * microbatches
    batches = make_batches(
        steps, parsed.dp, rows, length, config.vocab_size, seed=seed, padding="right", ignore="uneven"
    )
    with RankPool(ranks) as pool:
        records = pool.run(train_on_rank, str(path), overrides, batches, arguments, ranks=ranks, timeout=3600.0)
    expected = reference_run(
        path, batches, lr=1e-3, clip=0.5, config_overrides=overrides, num_microbatches=microbatches
    )
    findings = [_numbers("losses", [r.losses for r in records], expected.losses)]
    for step, grads in enumerate(expected.grads):
        findings.append(_tensors(f"gradients of step {step}", assemble(r.grads[step] for r in records), grads))
    findings.append(_numbers("gradient norms", [r.norms for r in records], expected.grad_norms))
    findings.append(_tensors("weights at the end", assemble(r.weights for r in records), expected.weights))
    return findings


def _copy_layers(source: Path, layers: int, target: Path) -> None:
    """Writes a checkpoint of the model's first layers."""
    config = json.loads((source / "config.json").read_text())
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise InputError(f"layers={layers} must lie between 1 and the model's {config['num_hidden_layers']}.")
    config |= {"num_hidden_layers": layers}
    config |= {key: config[key][:layers] for key in ("layer_types",) if config.get(key)}
    (target / "config.json").write_text(json.dumps(config))
    checkpoint = HFCheckpoint(source)
    kept = [n for n in checkpoint.tensors if not (m := re.match(r"model\.layers\.(\d+)\.", n)) or int(m[1]) < layers]
    save_file({name: checkpoint.read(name, ()) for name in kept}, target / "model.safetensors", {"format": "pt"})
    checkpoint.close()


def _numbers(what: str, of_ranks: list[list[float]], expected: list[float]) -> Finding:
    errors = {
        f"step {step} on rank {rank}": abs(a - b) / max(abs(b), 1e-300)
        for rank, numbers in enumerate(of_ranks)
        for step, (a, b) in enumerate(zip(numbers, expected, strict=True))
    }
    worst = max(errors, key=lambda name: errors[name])
    return Finding(what, errors[worst], worst)


def _tensors(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor | None]) -> Finding:
    errors = {}
    for name, tensor in expected.items():
        if tensor is None or name not in found:
            errors[name] = 0.0 if tensor is None and name not in found else float("inf")
        else:
            errors[name] = relative_error(found[name], tensor)
    worst = max(errors, key=lambda name: errors[name])
    return Finding(what, errors[worst], worst)
