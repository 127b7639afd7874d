# SPDX-License-Identifier: Apache-2.0
"""Jobs in which data ranks predict different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_moefold import MoECausalLM
from tests.strategy import finetune
from tests.strategy.finetune import make


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        self.tokens = finetune.rows(count, 3)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "input_ids": self.tokens[index]}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Without a length; data rank r has the rows r, r + dp, ..."""

    def __init__(self, count: int, rank: int, size: int) -> None:
        self.rows, self.mine = Rows(count), range(rank, count, size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.rows[index] for index in self.mine)


class Predictor(pl.LightningModule):
    """Returns rows with their logits, and keeps what it has seen."""

    def __init__(self, path: str, **spec: Any) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        self.model: MoECausalLM | None = None
        self.teacher: MoECausalLM | None = None
        self.seen: list[int] = []
        self.hooks: list[str] = []
        self.texts: dict[int, Tensor] = {}

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_pretrained(self.path, output_router_logits=True)
            if self.spec.get("teacher"):
                self.teacher = MoECausalLM.from_pretrained(self.path)

    def predict_dataloader(self) -> Any:
        counts, strategy = self.spec["rows"], self.trainer.strategy
        if self.spec.get("stream"):
            streams = [Stream(count, strategy.dp_rank, strategy.dp_size) for count in counts]
            return [DataLoader(stream, batch_size=2) for stream in streams]
        return [DataLoader(Rows(count), batch_size=2) for count in counts]

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        index = batch["index"].tolist()
        self.seen += index
        if self.spec.get("fails") in index:
            raise OSError("the disk is full")
        if 5 in index and self.spec.get("bad"):
            batch["input_ids"][0, 0] = 96
        if self.teacher is not None:
            for _ in range(index[0] % 3):  # of an unequal number, and before the other model
                taught = self.teacher(batch["input_ids"], gather_logits=True).logits
        logits = self.model(batch["input_ids"], gather_logits=True).logits
        if self.spec.get("generates"):  # another number of tokens on each data rank
            texts = self.model.generate(batch["input_ids"], max_new_tokens=1 + index[0] % 4, eos_token_id=())
            self.texts |= dict(zip(index, texts, strict=True))
        if self.teacher is not None and index[0] % 3:
            torch.testing.assert_close(taught, logits, rtol=1e-10, atol=1e-10)
        return batch["index"], logits

    def on_predict_batch_end(self, outputs: Any, batch: dict[str, Tensor], *_: Any) -> None:
        if self.spec.get("late"):  # a call behind the last step
            again = self.model(batch["input_ids"], gather_logits=True).logits
            torch.testing.assert_close(again, outputs[1], rtol=1e-10, atol=1e-10)

    def on_predict_epoch_end(self) -> None:
        self.hooks.append("end")


class IteratorPredictor(Predictor):
    """Fetches its batches itself."""

    def predict_step(self, dataloader_iter: Iterator[Any]) -> Any:  # type: ignore[override]
        batch, batch_idx, dataloader_idx = next(dataloader_iter)
        return super().predict_step(batch, batch_idx, dataloader_idx)


class Writer(BasePredictionWriter):
    """Gathers something over all ranks when all have predicted."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        count = torch.tensor(len(pl_module.seen))
        dist.all_reduce(count)
        pl_module.hooks.append(str(int(count)))


def predict(path: str, fold: str, spec: dict[str, Any], arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What a rank has predicted: ``{(loader, row): logits}``, and how it was left."""
    module = (IteratorPredictor if spec.get("iterator") else Predictor)(path, **spec)
    run = make(fold, {"callbacks": [Writer()] if spec.get("writes") else [], **arguments}, **options)
    before = list(run.callbacks)
    predictions = run.predict(module)
    assert module.model is not None
    if predictions and isinstance(predictions[0], tuple):
        predictions = [predictions]
    rows = {
        (loader, int(index)): logits.clone()
        for loader, batches in enumerate(predictions or [])
        for indices, logits_B in batches
        for index, logits in zip(indices, logits_B, strict=True)
    }
    loads = sum(int(layer.load_E.sum()) for layer in module.model.moe_layers().values())
    return {
        "rows": rows, "texts": module.texts, "seen": module.seen, "hooks": module.hooks, "loads": loads,
        "callbacks": before == run.callbacks, "open": module.model.unequal is not None,
        "strict": not module.allow_zero_length_dataloader_with_multiple_devices,
        "sharded": all(p.shape == module.model.layouts[n].shape for n, p in module.model.named_parameters()),
        "training": module.training, "grad": torch.is_grad_enabled(),
    }  # fmt: skip


def cases(path: str, runs: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [predict(path, fold, spec, arguments, **options) for fold, spec, arguments, options in runs]


def failing(path: str, fold: str, spec: dict[str, Any]) -> str:
    try:
        predict(path, fold, spec, {})
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None:
            message += f" <- {error.__cause__}"
        return message
    return "no error"


def _broken(*_: Any) -> None:
    raise RuntimeError("the kernel is gone")


class BrokenPredictor(Predictor):
    def on_predict_start(self) -> None:
        if dist.get_rank() == 1:
            self.model.model.layers["1"].mlp.gate.forward = _broken


def failing_inside(path: str, fold: str) -> None:
    make(fold, {}).predict(BrokenPredictor(path, rows=[8]))


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def predict_step(self, batch: dict[str, Tensor], _: int) -> list[int]:
        return batch["index"].tolist()


def plain(fold: str) -> Any:
    """A module without an MoE model, and fewer rows than ranks."""
    return make(fold, {"precision": "32-true"}).predict(Plain(), DataLoader(Rows(1), batch_size=2))


def by_hand(path: str, fold: str) -> dict[str, Any]:
    """Calls of unequal number outside a Trainer's prediction."""
    from tests.strategy.jobs_bad_input import make_model, told

    model = make_model(path, fold, dtype=torch.float64)
    model.train()
    batch = finetune.rows(2, 3)
    seen: dict[str, Any] = {}
    with torch.no_grad():
        expected = model(batch, gather_logits=True).logits
        loads = sum(int(layer.load_E.sum()) for layer in model.moe_layers().values())
        same = []
        with model.unequal_calls(), model.unequal_calls():
            for _ in range(dist.get_rank() // 2):
                same.append(torch.allclose(model(batch, gather_logits=True).logits, expected, rtol=1e-10))
        seen["same"] = same
        seen["loads"] = sum(int(layer.load_E.sum()) for layer in model.moe_layers().values()) - loads * (1 + len(same))

    def with_gradients() -> None:
        with model.unequal_calls():
            model(batch)

    seen["gradients"] = told(with_gradients)
    seen["again"] = told(lambda: model(batch, labels=batch).loss.backward())
    return seen
