# SPDX-License-Identifier: Apache-2.0
"""Jobs about precision, and about the collectives of a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.testing.pieces import owned_pieces
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, make


class Watched(Finetune):
    """Looks at dtypes inside and outside the model, beside a layer of its own."""

    def configure_model(self) -> None:
        super().configure_model()
        self.own = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {}
        assert self.model is not None
        for layer in self.model.model.layers.values():  # a pipeline will leave some of them to this rank
            layer.self_attn.q_proj.register_forward_hook(lambda m, i, o: self._note("inside", o.dtype))
            layer.mlp.gate.register_forward_hook(lambda m, i, o: self._note("router", o[0].dtype))
            layer.mlp.gate.register_forward_pre_hook(lambda m, i: self._note("router weight", m.weight.dtype))
            layer.register_forward_hook(lambda *_: self._note("autocast inside", torch.is_autocast_enabled("cpu")))

    def _note(self, name: str, value: Any) -> None:
        self.seen.setdefault(name, str(value))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self._note("own", self.own(torch.ones(2, 4, dtype=self.own.weight.dtype)).dtype)
        self._note("autocast", torch.is_autocast_enabled("cpu"))
        return super().training_step(batch, index)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._note("gradients", sorted({str(p.grad.dtype) for p in self.model.parameters() if p.grad is not None}))
        self._note("storage", sorted({str(p.dtype) for p in self.model.parameters()}))
        if not hasattr(self, "grads"):
            self.grads = owned_pieces(self.model, "grad")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


def train(path: str, fold: str, precision: str, tokens: Tensor, sharding: str) -> dict[str, Any]:
    """Some steps on the same rows."""
    module = Watched(path)
    module.steps = lambda count, seed: finetune.Steps(  # type: ignore[method-assign]
        tokens, module.trainer.strategy.dp_rank, module.trainer.strategy.dp_size
    )
    strategy = MoEFoldStrategy(
        fold=fold, data_parallel_sharding=sharding, num_microbatches=1, pipeline_schedule="gpipe"  # type: ignore[arg-type]
    )  # fmt: skip
    from tests.strategy.plain_modules import trainer

    trainer(strategy, precision=precision, max_epochs=1, gradient_clip_val=1.0, limit_val_batches=0).fit(module)
    return {
        "losses": module.report.losses,
        "seen": module.seen,
        "grads": module.grads,
        "weights": owned_pieces(module.model),
    }


def train_folds(path: str, folds: list[tuple[str, str]], precision: str, tokens: Tensor) -> list[dict[str, Any]]:
    """Trains under each fold and way to store weights."""
    return [train(path, fold, precision, tokens, sharding) for fold, sharding in folds]


def refuse() -> dict[str, str]:
    """Plugins that are refused by name. On the CPU Lightning itself turns 16-mixed into bf16-mixed."""
    from tests.strategy.jobs_bad_input import told

    class TransformerEnginePrecision(Precision):
        precision = "transformer-engine"  # type: ignore[assignment]

    class BitsandbytesPrecision(Precision):
        precision = "nf4"  # type: ignore[assignment]

    class UsersPrecision(Precision):
        pass

    def put(plugin: Precision) -> None:
        MoEFoldStrategy().precision_plugin = plugin

    return {
        "16-mixed": told(lambda: put(MixedPrecision("16-mixed", "cuda"))),
        "16-true": told(
            lambda: pl.Trainer(strategy=MoEFoldStrategy(), accelerator="cpu", devices=1, precision="16-true")
        ),
        "16-true'": told(lambda: put(HalfPrecision("16-true"))),
        "transformer-engine": told(lambda: put(TransformerEnginePrecision())),
        "BitsandbytesPrecision": told(lambda: put(BitsandbytesPrecision())),
        "UsersPrecision": told(lambda: put(UsersPrecision())),
    }


# ---- collectives -----------------------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives(path: str, fold: str) -> dict[str, int]:
    """How many collectives one training step takes: forward, backward, clipping."""
    counter = _Counting()

    class Counted(Finetune):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                counter.__enter__()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                counter.__exit__(None, None, None)

    make(fold, {"max_steps": 2, "limit_val_batches": 0, "gradient_clip_val": 1.0}).fit(Counted(path))
    return dict(counter.counts)


def blocked(path: str, fold: str) -> dict[str, Any]:
    """Whether accumulating batches leave gradients unreduced."""
    flags: list[list[bool]] = []

    class Watching(Finetune):
        def on_after_backward(self) -> None:
            units = [m for m in self.modules() if isinstance(m, FSDPModule)]
            flags.append(sorted({m._get_fsdp_state()._fsdp_param_group.reduce_grads for m in units
                                 if m._get_fsdp_state()._fsdp_param_group is not None}))  # fmt: skip

    make(fold, {"max_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}).fit(Watching(path))
    return {"flags": flags}
