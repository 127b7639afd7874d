# SPDX-License-Identifier: Apache-2.0
"""Training steps of a Qwen2-MoE of about a billion parameters under the Trainer, beside Hugging Face's model."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpu_parts.clock import Watch, peak_flops
from gpu_parts.record import Context, free_memory
from lightning_moefold import MoECausalLM, MoEConfig, MoEFoldStrategy
from lightning_moefold.callbacks import MFUMonitor

_SKIPPED = 4  # steps that allocate and choose kernels
_MOST_SECONDS = 18.0  # of a run


def run(ctx: Context) -> None:
    """The part."""
    path = ctx.scratch / "model"
    ctx.record.attempt("the model", "weights", partial(_write_model, ctx, path), limit=50)
    if not (path / "config.json").exists():  # an earlier process of this part wrote into the folder that is gone
        _write_model(ctx, path)
    found: dict[tuple[str, str], list[float]] = {}
    for precision in ("bf16-mixed", "bf16-true"):
        for name in ("moefold", "Hugging Face, Lightning"):
            ctx.record.attempt(
                "training steps, AdamW, one device", name, partial(_train, ctx, path, name, precision, found), limit=55,
                precision=precision,
            )  # fmt: skip
            free_memory()
    for precision in ("bf16-mixed", "bf16-true"):
        ours, theirs = (found.get((name, precision), []) for name in ("moefold", "Hugging Face, Lightning"))
        for step, (a, b) in list(enumerate(zip(ours, theirs, strict=False)))[:6]:
            ctx.record.row(
                "losses", precision=precision, step=step, moefold=a, huggingface=b, difference=abs(a - b) / abs(b)
            )


def _config(ctx: Context) -> dict[str, Any]:
    hidden, layers, experts, k, width, shared, vocab, heads = ctx.pick(
        (2048, 4, 32, 4, 1024, 4096, 32000, 16), (32, 2, 4, 2, 16, 32, 96, 4)
    )
    return {
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 4, "num_experts": experts, "num_experts_per_tok": k, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared, "intermediate_size": shared, "router_aux_loss_coef": 0.0,
        "max_position_embeddings": 4096,
    }  # fmt: skip


def _write_model(ctx: Context, path: Path) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(ctx.device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen2_moe", **_config(ctx)), dtype=torch.bfloat16
        )
    begin = time.perf_counter()
    model.save_pretrained(path)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    rows, length = _batch_shape(ctx)
    return {"billions of parameters": billions, "tokens of a step": rows * length, "rows of": length,
            "seconds to write": time.perf_counter() - begin}  # fmt: skip


def _batch_shape(ctx: Context) -> tuple[int, int]:
    shape: tuple[int, int] = ctx.pick((4, 2048), (2, 32))
    return shape


class _Tokens(Dataset[dict[str, Tensor]]):
    def __init__(self, shape: tuple[int, int], vocab: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = torch.randint(vocab, (count, *shape), generator=generator)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.batches[index], "labels": self.batches[index]}


class _Model(pl.LightningModule):
    """Either model, with the optimizer as a user writes it."""

    def __init__(self, path: Path, ours: bool) -> None:
        super().__init__()
        self.path, self.ours = path, ours
        self.model: Any = None
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.ours:
            self.model = MoECausalLM.from_pretrained(self.path)
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=torch.get_default_dtype(),
                attn_implementation="sdpa",
                experts_implementation="grouped_mm",
            ).train()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        more = {} if self.ours else {"use_cache": False}
        loss: Tensor = self.model(**batch, **more).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


@dataclass(eq=False)
class _Clock(pl.Callback):
    """Stamps at the beginning of each step; ends a run that takes long.

    Args:
        ctx: Where it runs.
    """

    ctx: Context
    begin: float = field(default_factory=time.monotonic)
    peak: float | None = None

    def __post_init__(self) -> None:
        self.watch, self.steps = Watch(self.ctx.device), 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.watch.stamp()
        self.steps += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.steps > _SKIPPED + 2 and time.monotonic() - self.begin > _MOST_SECONDS:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.watch.stamp()
        if self.ctx.on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() / 1e9
        for optimizer in trainer.optimizers:  # or the Trainer copies its state to the host
            optimizer.state.clear()

    def step_ms(self) -> list[float]:
        """Of each step but the last, whose end is not marked by another."""
        times = [0.0, *self.watch.milliseconds()]
        return [b - a for a, b in zip(times[:-1], times[1:-1], strict=False)]


def _train(
    ctx: Context, path: Path, name: str, precision: Any, found: dict[tuple[str, str], list[float]]
) -> dict[str, Any]:  # fmt: skip
    ours = name == "moefold"
    if ctx.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps = ctx.pick(20, _SKIPPED + 3)
    shape, config = _batch_shape(ctx), MoEConfig.from_pretrained(path)
    monitor = MFUMonitor(log_every_n_steps=1, warmup_steps=_SKIPPED, peak_flops=None if ctx.on_gpu else 1e12)
    clock, module = _Clock(ctx), _Model(path, ours)
    trainer = pl.Trainer(
        accelerator="gpu" if ctx.on_gpu else "cpu", devices=1, strategy=MoEFoldStrategy() if ours else "auto",
        precision=precision, max_steps=steps, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor, clock],
        use_distributed_sampler=False,  # Lightning's shuffles, and only under a strategy of several processes
    )  # fmt: skip
    trainer.fit(module, DataLoader(_Tokens(shape, config.vocab_size, steps), batch_size=None))
    found[name, precision] = [float(loss) for loss in module.losses]
    ms = statistics.median(clock.step_ms()[_SKIPPED:])
    tokens = shape[0] * shape[1]
    flops = 3 * config.forward_flops_per_token(shape[1]) * tokens
    return {
        "ms": ms, "tokens/s": tokens / ms * 1e3, "MFU": flops / ms * 1e3 / peak_flops(ctx.device),
        "MFUMonitor": monitor.latest.get("train/mfu"), "its step ms": monitor.latest.get("train/step_time", 0) * 1e3,
        "peak_gb": clock.peak, "steps": clock.steps,
    }  # fmt: skip
