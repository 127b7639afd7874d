# SPDX-License-Identifier: Apache-2.0
"""Small training runs under the Trainer on one device: default optimizers beside plain Lightning, equal runs, resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from gpu_parts.record import Context
from lightning_moefold import LoRA, MoECausalLM, MoEConfig, MoEFoldStrategy
from lightning_moefold.modules import Attention, DecoderLayer, MoELayer

_VOCAB = 96
Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class _Step(pl.LightningModule):
    """A module whose batch depends on nothing but the number of the step."""

    def __init__(self, make: Optimizers, length: int) -> None:
        super().__init__()
        self.make, self.length = make, length
        self.losses: list[float] = []

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + self.global_step)
        return torch.randint(_VOCAB, (4, self.length), generator=generator).to(self.device)

    def loss(self, token_BS: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, _: Any, __: int) -> Tensor:
        loss = self.loss(self.batch())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(p for p in self.parameters() if p.requires_grad)


class _Network(_Step):
    """A decoder layer between modules of its own."""

    def __init__(self, make: Optimizers, length: int, hidden: int) -> None:
        super().__init__(make, length)
        self.embed = nn.Embedding(_VOCAB, hidden)
        self.layer = DecoderLayer(hidden, Attention(hidden, 4, 2), MoELayer(hidden, 8, 2, hidden))
        self.head = nn.Linear(hidden, _VOCAB)

    def loss(self, token_BS: Tensor) -> Tensor:
        logits = self.head(self.layer(self.embed(token_BS)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), token_BS[:, 1:].flatten())


class Language(_Step):
    """A small language model, or an adapter of one."""

    def __init__(self, make: Optimizers, length: int, hidden: int, adapter: LoRA | None = None) -> None:
        super().__init__(make, length)
        self.model: MoECausalLM | None = None
        self.adapter = adapter
        self.config = {
            "model_type": "qwen2_moe", "vocab_size": _VOCAB, "hidden_size": hidden, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden, "shared_expert_intermediate_size": hidden, "intermediate_size": hidden,
            "output_router_logits": True,
        }  # fmt: skip

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_config(MoEConfig.from_hf(self.config))
            if self.adapter is not None:
                self.model.add_adapter(self.adapter)

    def loss(self, token_BS: Tensor) -> Tensor:
        assert self.model is not None
        loss = self.model(token_BS, labels=token_BS).loss
        assert loss is not None
        return loss


def plain_attention() -> AbstractContextManager[None]:
    """Attention by plain products, where bits are compared: backward of the fused kernels adds in an order of its own each time."""
    return sdpa_kernel(SDPBackend.MATH)


def fit(
    ctx: Context, module: _Step, steps: int, precision: Any, strategy: Any, ckpt: Any = None, save: Any = None,
    callbacks: list[pl.Callback] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Trains, and returns a copy of all parameters as they are on this device."""
    trainer = pl.Trainer(
        accelerator="gpu" if ctx.on_gpu else "cpu", devices=1, strategy=strategy, precision=precision, max_steps=steps,
        max_epochs=-1, logger=False, enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(
        module,
        DataLoader(TensorDataset(torch.zeros(64, 1)), batch_size=1),
        ckpt_path=ckpt,
        weights_only=False if ckpt else None,
    )
    if save is not None:
        trainer.save_checkpoint(save)
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return [p.detach().clone().cpu() for p in parameters]


def run_optimizers(ctx: Context) -> None:
    """Optimizers as users write them, over an MoE block and parameters of the module's own, beside Lightning's strategy."""
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    cases: tuple[tuple[str, Optimizers, str, dict[str, Any]], ...] = (
        ("AdamW", adamw, "bf16-mixed", {}),
        ("AdamW", adamw, "bf16-true", {}),
        ("AdamW", adamw, "32-true", {}),
        ("AdamW, sharding none", adamw, "bf16-mixed", {"data_parallel_sharding": "none"}),
        ("AdamW(fused=True)", partial(adamw, fused=True), "bf16-mixed", {}),
        ("SGD with momentum", partial(torch.optim.SGD, lr=1e-2, momentum=0.9), "bf16-mixed", {}),
    )
    for name, make, precision, options in cases[: ctx.pick(6, 2)]:
        ctx.record.attempt(
            "optimizers of a network with own parameters, 5 steps, beside plain Lightning", name,
            partial(_beside_lightning, ctx, make, precision, options), precision=precision,
        )  # fmt: skip


def _beside_lightning(ctx: Context, make: Optimizers, precision: str, options: dict[str, Any]) -> dict[str, Any]:
    losses = []
    for strategy in (MoEFoldStrategy(**options), "auto"):
        pl.seed_everything(0, verbose=False)
        module = _Network(make, ctx.pick(128, 16), ctx.pick(256, 32))
        fit(ctx, module, ctx.pick(5, 2), precision, strategy)
        losses.append(module.losses)
    ours, theirs = losses
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return {"first loss": ours[0], "last": ours[-1], "plain Lightning": theirs[-1], "largest difference": apart,
            "ok": apart < (1e-4 if precision == "32-true" else 3e-2)}  # fmt: skip


def run_resume(ctx: Context) -> None:
    """Equal runs have equal bits; so has a run that was saved and resumed."""
    for precision in ctx.pick(("bf16-mixed", "bf16-true", "32-true"), ("bf16-mixed",)):
        ctx.record.attempt("a small language model, 4 steps, attention by plain products", "equal runs, saved and resumed",
                           partial(_resume, ctx, precision), precision=precision)  # fmt: skip


def _resume(ctx: Context, precision: str) -> dict[str, Any]:
    make = partial(torch.optim.AdamW, lr=1e-3)
    fresh = partial(Language, make, ctx.pick(128, 16), ctx.pick(256, 32))
    path = ctx.scratch / f"{precision}.ckpt"
    runs = []
    with plain_attention():
        for _ in range(2):
            module = fresh()
            runs.append((fit(ctx, module, 4, precision, MoEFoldStrategy()), module.losses))
        fit(ctx, fresh(), 2, precision, MoEFoldStrategy(), save=path)
        module = fresh()
        resumed = fit(ctx, module, 4, precision, MoEFoldStrategy(), ckpt=path), module.losses
    (weights, losses), (weights_again, losses_again) = runs
    equal = losses == losses_again and all(map(torch.equal, weights, weights_again))
    same = losses[2:] == resumed[1] and all(map(torch.equal, weights, resumed[0]))
    apart = max(float((a - b).abs().max()) for a, b in zip(weights, resumed[0], strict=True))
    return {"first loss": losses[0], "last": losses[-1], "equal runs: equal bits": equal, "resumed: equal bits": same,
            "largest difference": apart, "ok": equal and same}  # fmt: skip
