# SPDX-License-Identifier: Apache-2.0
"""Distil a teacher into a student of the same vocabulary, under any fold.

    python examples/distill.py --teacher DIR --student DIR --data a.txt --devices 4 --fold "tp2 | ep4"

First the teacher's most probable tokens at every position are stored, in one process; then the student learns them. What is
stored is used again, so that the teacher need not fit beside the student.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moefold import MoECausalLM, MoEFoldStrategy, ResumableSampler
from lightning_moefold.recipes import TextData, distillation_loss, top_log_probabilities


def store(args: argparse.Namespace, trainer: L.Trainer) -> Path:
    """Rows of tokens, and what the teacher says of them."""
    path = args.output / f"teacher-{args.top_k}.pt"
    if trainer.is_global_zero and not path.exists():
        args.output.mkdir(parents=True, exist_ok=True)
        data = TextData(
            args.data, args.teacher, args.sequence_length, 1, val_fraction=0.0, cache_dir=str(args.output / "tokens")
        )
        data.prepare_data()
        data.setup("fit")
        tokens = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
        teacher, found = MoECausalLM.from_pretrained(args.teacher, output_router_logits=True).eval(), []
        with torch.no_grad():
            for row in tokens.split(1):
                found.append(top_log_probabilities(teacher(row).logits, args.top_k))
        logprobs, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        draft = path.with_suffix(".draft")
        torch.save({"input_ids": tokens, "teacher_logprobs": logprobs, "teacher_ids": ids}, draft)
        draft.replace(path)
    return path


class Rows(torch.utils.data.Dataset):
    """What was stored, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.stored = torch.load(path, mmap=True, weights_only=True)

    def __len__(self) -> int:
        return len(self.stored["input_ids"])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = {name: tensor[number] for name, tensor in self.stored.items()}
        return row | {"labels": row["input_ids"]}


class Distill(L.LightningModule):
    def __init__(self, student: str, path: Path, args: argparse.Namespace) -> None:
        super().__init__()
        self.student, self.path, self.args = student, path, args
        self.model: MoECausalLM | None = None
        self.loss_fn = distillation_loss(args.weight, args.temperature)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_pretrained(self.student, output_router_logits=True)

    def train_dataloader(self) -> DataLoader:
        rows = Rows(self.path)
        strategy = self.trainer.strategy
        assert isinstance(strategy, MoEFoldStrategy)
        here, left = divmod(self.args.batch_size, strategy.dp_size)
        if left:
            raise SystemExit(f"--batch-size {self.args.batch_size} is no multiple of the number of data ranks")
        return DataLoader(rows, batch_size=here, sampler=ResumableSampler(rows))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.model is not None
        # Under a pipeline too: what is stored is cut as the rows are.
        output = self.model(**batch, loss_fn=self.loss_fn)
        self.log("train/loss", output.lm_loss, prog_bar=True)
        assert output.loss is not None
        return output.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.args.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--teacher", required=True, metavar="DIR", help="model and tokenizer in Hugging Face format")
    add("--student", required=True, metavar="DIR", help="a model of the same vocabulary")
    add("--data", required=True, nargs="+", metavar="FILE", help="text, as for moefold fit")
    add("--output", type=Path, default=Path("runs/distill"), metavar="DIR", help="where everything is written")
    add("--top-k", type=int, default=16, help="tokens that are stored of each position")
    add("--weight", type=float, default=0.9, help="of the teacher; the rest is that of the labels")
    add("--temperature", type=float, default=1.0, help="of both distributions")
    add("--sequence-length", type=int, default=128, help="tokens in a row")
    add("--batch-size", type=int, default=8, help="rows of a batch over all data ranks")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--epochs", type=int, default=1, help="passes over the rows")
    add("--fold", default="", help='parallel sizes, such as "tp2 | ep4"')
    add("--devices", type=int, default=1, help="ranks on this node")
    add("--num-microbatches", type=int, help="of a batch; a pipeline needs a number")
    args = parser.parse_args()
    trainer = L.Trainer(
        strategy=MoEFoldStrategy(fold=args.fold, num_microbatches=args.num_microbatches), accelerator="auto",
        devices=args.devices, max_epochs=args.epochs, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    module = Distill(args.student, store(args, trainer), args)
    trainer.fit(module)
    assert module.model is not None
    module.model.save_pretrained(args.output / "model")
    if trainer.is_global_zero:
        print(f"train/loss {trainer.callback_metrics['train/loss']:.4f}; the student is in {args.output / 'model'}")


if __name__ == "__main__":
    main()
