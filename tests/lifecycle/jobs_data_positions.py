# SPDX-License-Identifier: Apache-2.0
"""A loader that keeps its place on each data rank, as streaming datasets do, in fits that stop and go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold import ResumableSampler
from lightning_moefold.recipes.order import RowLoader, RowOrder
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, make


class Stream:
    """Rows of this data rank's own shard. A rank skips ``rank`` rows after each that it gives, so that places differ."""

    def __init__(self, rank: int) -> None:
        self.rank, self.next = rank, 0

    def __len__(self) -> int:
        """Known: of a loader without a length Lightning fetches a batch ahead, and its state has passed it."""
        return 32

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = finetune.rows(64, seed=self.rank)
        while True:
            row = self.next
            self.next += 1 + self.rank
            yield {"input_ids": rows[row : row + 1], "labels": rows[row : row + 1], "row": torch.tensor([row])}

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Streaming(Finetune):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.seen: list[int] = []

    def train_dataloader(self) -> Any:
        return Stream(self.trainer.strategy.dp_rank)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append(int(batch.pop("row")))
        return super().training_step(batch, index)


class Numbered(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows that know their number; of 22, batches of four leave two over."""

    def __init__(self, plain: bool, count: int = 22) -> None:
        self.rows, self.plain = finetune.rows(count), plain

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"row": torch.tensor([index])}
        if self.plain:
            return {"x": torch.randn(32, generator=torch.Generator().manual_seed(index)), **row}
        return {"input_ids": self.rows[index], "labels": self.rows[index], **row}


class _Dealt:
    """Notes the rows of each batch over all data ranks; its dataloader is ``kind``."""

    trainer: Any
    kind: str
    plain = False

    def train_dataloader(self) -> Any:
        strategy, data = self.trainer.strategy, Numbered(self.plain)
        rows = 4 // strategy.dp_size
        if self.kind == "lightning":  # which puts in a sampler of its own
            return DataLoader(Numbered(self.plain, 24), batch_size=rows, shuffle=True)
        loader = DataLoader(
            data, batch_size=rows, sampler=ResumableSampler(data, seed=3), num_workers=self.kind == "workers"
        )
        return [loader, DataLoader(range(50), batch_size=rows)] if self.kind == "two" else loader

    def val_dataloader(self) -> Any:
        data = Numbered(self.plain)
        return DataLoader(data, batch_size=2, sampler=ResumableSampler(data) if self.kind == "validation" else None)

    def note(self, batch: dict[str, Tensor]) -> None:
        rows_DB = self.trainer.strategy.all_gather(batch.pop("row").flatten()).view(
            -1, 4 // self.trainer.strategy.dp_size
        )
        fold = self.trainer.strategy.fold
        by_rank = {fold.coordinates(rank)["dp"]: rows_B for rank, rows_B in enumerate(rows_DB)}
        self.seen.append(torch.stack([by_rank[rank] for rank in sorted(by_rank)]).T.flatten().tolist())


class Dealt(_Dealt, Finetune):
    def __init__(self, path: str, kind: str) -> None:
        super().__init__(path)
        self.kind, self.seen = kind, []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.note(batch)
        return super().training_step(batch, index)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None: ...


class Plain(_Dealt, BoringModel):
    plain = True

    def __init__(self, path: str, kind: str) -> None:
        super().__init__()
        self.kind, self.seen = kind, []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        self.note(batch)
        return super().training_step(batch["x"], index)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None: ...


def deal(
    path: str, fold: str, folder: str, steps: int, ckpt_path: str | None = None, kind: str = "", plain: bool = False,
    **arguments: Any,
) -> tuple[list[list[int]], list[float], str]:  # fmt: skip
    """The rows of each batch, its losses, and the error if there is one. Saves after each step and each epoch."""
    module = (Plain if plain else Dealt)(path, kind)
    savers = [
        ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint(folder, filename="end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    arguments = {"limit_val_batches": 0, **arguments}
    run = make(fold, {"callbacks": savers, "enable_checkpointing": True, "max_steps": steps, **arguments})
    losses: list[float] = []
    try:
        run.fit(module, ckpt_path=ckpt_path)
        losses = [] if plain else module.report.losses
        said = ""
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    return module.seen, losses, said


class Rows(_Dealt, BoringModel):
    """Plain layers on rows in the order of ``TextData``, or of the sampler; may ask for the number of steps at the beginning."""

    plain = True

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.seen = kind, []

    def configure_optimizers(self) -> Any:
        if self.kind == "asks":
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        if self.kind != "text":
            return super().train_dataloader()
        order = RowOrder(20, 4, 0, 1, shuffle=True, seed=3)
        return RowLoader(order, lambda row_B: {"row": row_B, "x": torch.ones(len(row_B), 32)})

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        self.seen.append(batch["row"].tolist())
        return super().training_step(batch["x"], index)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None: ...


def ends_of_epochs(folder: str) -> list[tuple[Any, ...]]:
    """For several runs what was read from step 10 on, and what a run reads that resumes at the end of the second epoch."""
    found: list[tuple[Any, ...]] = []
    for kind in ("text", "sampler", "asks"):
        for limits in ({"max_steps": 18}, {"max_epochs": 4}):
            for batches in (0, 1):
                here = Path(folder, f"{kind} {limits} {batches}")

                def fit(checkpoint: Path | None, kind: str = kind, here: Path = here, **more: Any) -> Any:
                    savers = [
                        ModelCheckpoint(here, "end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
                        ModelCheckpoint(
                            here, "val-{epoch}", save_top_k=-1, save_on_train_epoch_end=False, every_n_epochs=2
                        ),
                        ModelCheckpoint(here, "{step}", save_top_k=-1, every_n_train_steps=10),
                    ]
                    module = Rows(kind)
                    arguments = {"callbacks": savers, "enable_checkpointing": True, "num_sanity_val_steps": 0, **more}
                    run = make("", {**arguments, "precision": "32-true"})
                    run.fit(module, ckpt_path=checkpoint)
                    return module.seen

                arguments = {**limits, "limit_val_batches": batches}
                whole = fit(None, **arguments)
                for name in ("end-epoch=1", "val-epoch=1", "step=10"):
                    if (here / f"{name}.ckpt").exists():
                        seen = fit(here / f"{name}.ckpt", **arguments)
                        found.append((f"{kind}, {arguments}, {name}", seen, whole[10:]))
    return found


class Wide(Rows):
    """Batches of as many rows as are asked for, of 24; notes after how many batches it was validated."""

    def __init__(self, rows: int, seed: int = 3, kind: str = "") -> None:
        super().__init__(kind)
        self.rows, self.seed, self.validated = rows, seed, []

    def train_dataloader(self) -> Any:
        data = Numbered(True, 24)
        return DataLoader(data, batch_size=self.rows, sampler=ResumableSampler(data, seed=self.seed))

    def on_validation_start(self) -> None:
        self.validated.append(len(self.seen))


def later_fits(folder: str) -> dict[str, Any]:
    """Resumes in the middle of an epoch with more and fewer rows, another order and another interval; and fits twice."""

    def trainer(**more: Any) -> Any:
        return make("", {"limit_val_batches": 1, "num_sanity_val_steps": 0, "precision": "32-true", **more})

    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=6)
    trainer(callbacks=[saver], enable_checkpointing=True, max_epochs=1).fit(Wide(2))
    found: dict[str, Any] = {}
    for name, module, more in [
        ("four", Wide(4), {}), ("one", Wide(1), {}), ("asks", Wide(4, kind="asks"), {}),
        ("seed", Wide(2, seed=4), {}), ("interval", Wide(4), {"val_check_interval": 8}),
    ]:  # fmt: skip
        said = ""
        try:
            trainer(max_epochs=3, **more).fit(module, ckpt_path=f"{folder}/step=6.ckpt")
        except ValueError as error:
            said = str(error)
        found[name] = [row for batch in module.seen for [row] in batch], module.validated, said
    again, twice = trainer(max_epochs=1, limit_train_batches=4), Wide(4)
    again.fit(twice)
    again.fit_loop.max_epochs = 2
    again.validate(twice)
    again.fit(twice)
    found["twice"] = [row for batch in twice.seen for [row] in batch], twice.validated, ""
    return found


def deal_all(cases: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[tuple[list[list[int]], list[float], str]]:
    return [deal(*positional, **named) for positional, named in cases]


def stream(path: str, fold: str, folder: str, steps: int, ckpt_path: str | None) -> tuple[int, list[int], str]:
    """Data rank, the rows that it read, and the error if there is one."""
    module = Streaming(path)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    run = make(fold, {"callbacks": [saver], "enable_checkpointing": True, "max_steps": steps, "limit_val_batches": 0})
    try:
        run.fit(module, ckpt_path=ckpt_path)
    except ValueError as error:
        return run.strategy.dp_rank, module.seen, str(error)
    return run.strategy.dp_rank, module.seen, ""
