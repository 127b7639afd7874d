# SPDX-License-Identifier: Apache-2.0
"""What callbacks cost: one run in which they take turns with nothing, block by block of steps.

    python benchmarks/monitors.py [--blocks 12] [--hidden 512] ...
    torchrun --nproc-per-node 2 benchmarks/monitors.py --fold "tp2 | ep2" [--of non_finite_guard]

``--of monitors`` are MFUMonitor and LoadBalanceMonitor, ``non_finite_guard`` is NonFiniteGuard, ``replica_guard`` is ReplicaGuard,
here after every step instead of every thousandth.

A block is one logging interval, and so has exactly one log step. Two figures are printed: the ratio of neighbouring
blocks' times, which says what a user pays but is as noisy as the machine; and the time spent in the monitors' hooks and
in writing what they log, which a busy machine blurs less.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from step import Tokens
from torch.utils.data import DataLoader

from lightning_moefold import Fold, MoECausalLM, MoEFoldStrategy
from lightning_moefold.callbacks import LoadBalanceMonitor, MFUMonitor, NonFiniteGuard, ReplicaGuard

HOOKS = ("on_train_batch_start", "on_train_batch_end")


class Module(pl.LightningModule):
    """A training that logs a loss, and switches its monitors on and off between blocks."""

    def __init__(self, config: dict[str, Any], monitors: list[pl.Callback], block: int) -> None:
        super().__init__()
        self.config, self.monitors, self.block = config, monitors, block
        self.model: MoECausalLM | None = None
        self.blocks: list[tuple[bool, float, float]] = []  # monitored, seconds, seconds in hooks and logging
        self.extra = 0.0

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_config(self.config)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        assert self.model is not None
        loss = self.model(**batch).loss
        assert loss is not None
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    def on_train_start(self) -> None:
        for monitor in self.monitors:
            for name in HOOKS:
                setattr(monitor, name, self.timed(getattr(monitor, name)))
        strategy = self.trainer.strategy
        assert isinstance(strategy, MoEFoldStrategy)
        self.precision = strategy._precision
        self.check = self.precision.step_check  # that of NonFiniteGuard
        if self.check is not None:
            for name in ("saw_loss", "_numbers"):
                setattr(self.check, name, self.timed(getattr(self.check, name)))
        connector = self.trainer._logger_connector  # where Lightning writes what was logged
        name = "update_train_step_metrics"
        setattr(connector, name, self.timed(getattr(connector, name)))
        trainer: Any = self.trainer  # Lightning does not declare its callbacks
        self.others = [c for c in trainer.callbacks if c not in self.monitors]
        self.start = time.perf_counter()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.extra += time.perf_counter() - begin

        return call

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Here what the step before has logged is written, and all callbacks have been called.
        if self.global_step == 0 or self.global_step % self.block:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trainer: Any = self.trainer
        now, on = time.perf_counter(), self.monitors[0] in trainer.callbacks
        self.blocks.append((on, now - self.start, self.extra))
        trainer.callbacks = self.others if on else [*self.others, *self.monitors]
        self.precision.step_check = None if on else self.check
        self.start, self.extra = time.perf_counter(), 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("blocks", 12), ("interval", 50), ("rows", 1), ("length", 64), ("hidden", 256), ("layers", 8),
                          ("ffn", 256), ("experts", 16), ("top-k", 2), ("vocab", 4000)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fold", default="")
    parser.add_argument("--of", default="monitors", choices=("monitors", "non_finite_guard", "replica_guard"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    world = int(os.environ.get("WORLD_SIZE", 1))
    config = {
        "model_type": "qwen2_moe", "vocab_size": args.vocab, "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": args.ffn, "num_experts": args.experts,
        "moe_intermediate_size": args.ffn, "shared_expert_intermediate_size": args.ffn, "num_experts_per_tok": args.top_k,
        "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001, "output_router_logits": True,
    }  # fmt: skip
    kinds: dict[str, list[pl.Callback]] = {
        "monitors": [MFUMonitor(), LoadBalanceMonitor(keep_history=False)], "non_finite_guard": [NonFiniteGuard()],
        "replica_guard": [ReplicaGuard(every_n_steps=1)],
    }  # fmt: skip
    monitors = kinds[args.of]
    module = Module(config, monitors, args.interval)
    steps = args.interval * (args.blocks + 2) + 1  # the first block warms up, the last is not complete
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="auto", devices=world, strategy=MoEFoldStrategy(fold=args.fold), max_steps=steps, max_epochs=-1,
            log_every_n_steps=args.interval, logger=CSVLogger(folder), callbacks=monitors, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        rows = args.rows * world // Fold.parse(args.fold, world).dp
        data = Tokens(steps * args.rows * world, args.length, args.vocab)
        trainer.fit(module, DataLoader(data, batch_size=rows))
        if trainer.is_global_zero:
            report(module.blocks[1:], len(trainer.logged_metrics), args, world)


def report(blocks: list[tuple[bool, float, float]], keys: int, args: argparse.Namespace, world: int) -> None:
    pairs = [sorted(pair) for pair in zip(blocks[::2], blocks[1::2], strict=False)]  # without, with
    without, monitored = ([pair[i][1] / args.interval * 1e3 for pair in pairs] for i in (0, 1))
    ratios = [b / a for a, b in zip(without, monitored, strict=True)]
    extra = [(pair[1][2] - pair[0][2]) / args.interval * 1e3 for pair in pairs]
    shares = [e / a for e, a in zip(extra, without, strict=True)]
    print(f"{args.of}: {args.layers} MoE layers of {args.experts} experts, fold '{args.fold}' on {world} rank(s), "
          f"{args.rows * world} rows of "
          f"{args.length} tokens, log_every_n_steps={args.interval}, {keys} keys, {len(pairs)} pairs of blocks")  # fmt: skip
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}, "
          f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"ms per step without   {statistics.median(without):8.2f}")
    print(f"ms per step with      {statistics.median(monitored):8.2f}")
    print(f"ratio, median         {statistics.median(ratios):8.4f}  (of pairs: {' '.join(f'{r:.3f}' for r in ratios)})")
    print(
        f"ms in the callbacks   {statistics.median(extra):8.3f}  per step, log step included: {statistics.median(shares):.2%}"
    )


if __name__ == "__main__":
    main()
