"""Fine-tune a Mixture-of-Experts checkpoint on your own text, under any fold.

    python examples/finetune.py --checkpoint DIR --data a.txt b.jsonl --devices 4 --fold "tp2 | ep4"
    torchrun --nproc-per-node 4 examples/finetune.py --checkpoint DIR --data a.txt b.jsonl --fold "tp2 | ep4"

DIR is a Mixtral, Qwen2-MoE or Qwen3-MoE in Hugging Face format with its tokenizer. Under --output are afterwards
`model/` (Hugging Face format, the weights with the best validation loss), `checkpoints/` (to resume from, under this or
another fold and number of ranks), `logs/` (metrics.csv) and `tokens/`.

`FineTune` is an ordinary LightningModule: nothing in it knows of ranks, and it is the same under every fold.

Letters: N blocks of L tokens; B of them are a batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

from lightning_moefold import Fold, FoldError, MoECausalLM, MoEConfig, MoEFoldStrategy
from lightning_moefold.callbacks import FoldSummary, LoadBalanceMonitor, MFUMonitor
from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.models import ConfigError
from lightning_moefold.refusals import UnsupportedFeature


class InputError(ValueError):
    """Something that the user can mend; the message is one sentence."""


USER_ERRORS = (InputError, FoldError, ConfigError, CheckpointError, UnsupportedFeature, MisconfigurationException)


# ---- the module --------------------------------------------------------------------------------------------------


class FineTune(L.LightningModule):
    """Next-token training of a MoE language model. `train/loss` and `val/loss` are without the auxiliary loss."""

    def __init__(self, checkpoint: str, lr: float, warmup_steps: int, weight_decay: float, aux_loss: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: MoECausalLM | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MoECausalLM.from_pretrained(
                self.hparams.checkpoint, output_router_logits=self.hparams.aux_loss
            )

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        output = self.model(**batch)
        self.log("train/loss", output.lm_loss, prog_bar=True)
        if output.aux_loss is not None:
            self.log("train/aux_loss", output.aux_loss)
        return output.loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        loss = self.model(**batch).lm_loss
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))

    def on_validation_epoch_end(self) -> None:
        self.log("val/perplexity", self.trainer.callback_metrics["val/loss"].exp())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = AdamW(parameter_groups(self, self.hparams.weight_decay), self.hparams.lr, (0.9, 0.95), fused=True)
        schedule = warmup_cosine(optimizer, self.hparams.warmup_steps, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices, none for norms and biases."""
    groups: dict[bool, list[torch.nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault(parameter.ndim >= 2, []).append(parameter)
    return [{"params": group, "weight_decay": weight_decay * matrix} for matrix, group in sorted(groups.items())]


def warmup_cosine(optimizer: Optimizer, warmup: int, total: int, floor: float = 0.1) -> LambdaLR:
    """A linear rise over `warmup` steps, then a cosine down to `floor` times the learning rate at step `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


# ---- the data ----------------------------------------------------------------------------------------------------


class TextBlocks(L.LightningDataModule):
    """Text files as blocks of L consecutive tokens, every 1/`val_fraction`-th of them for validation.

    Documents (a .txt file, or the field `text` of a line of a .jsonl file) are joined by the tokenizer's end-of-text
    token. One rank makes the blocks; the others map its file into memory.

    Args:
        files: The text.
        checkpoint: Directory with the tokenizer.
        length: L.
        batch_size: B, of each data rank.
        val_fraction: Of the blocks.
        directory: Where the blocks are kept for the other ranks, and for the next time.
    """

    def __init__(
        self, files: list[Path], checkpoint: Path, length: int, batch_size: int, val_fraction: float, directory: Path
    ) -> None:
        super().__init__()
        self.files, self.checkpoint, self.length, self.batch_size = files, checkpoint, length, batch_size
        self.val_fraction, self.directory = val_fraction, directory

    def prepare_data(self) -> None:
        path = self._path()
        if path.exists():
            return
        blocks_NL = tokenize(self.files, self.checkpoint, self.length)
        if len(blocks_NL) < 2 or not all(map(len, self._split(len(blocks_NL)))):
            raise InputError(
                f"the data makes {len(blocks_NL)} blocks of --sequence-length {self.length} tokens, too few to train "
                f"and validate on with --val-fraction {self.val_fraction}; give more text or shorter blocks."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        torch.save(blocks_NL, draft)
        draft.replace(path)

    def setup(self, stage: str) -> None:
        blocks_NL = torch.load(self._path(), mmap=True)
        self.train, self.val = (Subset(blocks_NL, part) for part in self._split(len(blocks_NL)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=as_batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, collate_fn=as_batch)

    def _split(self, count: int) -> tuple[list[int], list[int]]:
        f = self.val_fraction
        val = [int((i + 1) * f) > int(i * f) for i in range(count)]
        return [i for i in range(count) if not val[i]], [i for i in range(count) if val[i]]

    def _path(self) -> Path:
        """Named for what the blocks depend on."""
        files = [*self.files, *sorted(self.checkpoint.glob("*token*")), *sorted(self.checkpoint.glob("vocab*"))]
        seen = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        key = hashlib.sha256(json.dumps([seen, self.length, self.val_fraction]).encode()).hexdigest()
        return self.directory / f"{key[:16]}.pt"


def as_batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Labels stand at the positions of their inputs, as in `transformers`; the model shifts them."""
    block_BL = torch.stack(rows)
    return {"input_ids": block_BL, "labels": block_BL}


def tokenize(files: list[Path], checkpoint: Path, length: int) -> Tensor:
    """The text as `[N, L]`; tokens after the last whole block are left out."""
    from transformers import AutoTokenizer  # here, as one rank needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} holds no tokenizer that transformers can load.") from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents(files):
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    count, largest = len(tokens) // length, max(tokens, default=0)
    if count == 0:
        raise InputError(f"the data has {len(tokens)} tokens, fewer than one block of --sequence-length {length}.")
    if largest >= (size := MoEConfig.from_pretrained(checkpoint).vocab_size):
        raise InputError(f"the tokenizer of {checkpoint} gives token {largest}, but the model has only {size} tokens.")
    return torch.tensor(tokens[: count * length]).view(count, length)


def documents(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        if path.suffix != ".jsonl":
            yield text
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    yield json.loads(line)["text"] + ""
                except (ValueError, TypeError, KeyError):
                    raise InputError(f'{path}, line {number} is not a JSON object with a string "text".') from None


# ---- the run -----------------------------------------------------------------------------------------------------


def main() -> None:
    quiet()
    try:
        finetune(parse_arguments())
    except USER_ERRORS as error:
        sys.exit(f"finetune.py: {error}" if rank_zero_only.rank == 0 else 1)


def finetune(args: argparse.Namespace) -> None:
    """Trains, then exports the weights with the best validation loss."""
    check_files(args)
    L.seed_everything(args.seed, verbose=False)
    data = make_data(args)
    trainer = make_trainer(args)
    check_fits(args, trainer.world_size)
    if rank_zero_only.rank == 0:
        data.prepare_data()  # before other ranks start, so that bad data is one message
    module = make_module(args)
    with peers_end_too(trainer):
        trainer.fit(module, data, ckpt_path=args.resume)
        restore_best(trainer, module, data)
        module.model.save_pretrained(args.output / "model")
    if trainer.is_global_zero:
        metrics = trainer.callback_metrics
        print(f"\nval/loss {metrics['val/loss']:.4f}, perplexity {metrics['val/perplexity']:.2f}")
        print(f"model, in Hugging Face format   {args.output / 'model'}")
        print(f"checkpoint to resume from       {args.output / 'checkpoints' / 'last.ckpt'}")
        print(f"metrics                         {Path(trainer.loggers[0].log_dir) / 'metrics.csv'}")


@contextmanager
def peers_end_too(trainer: L.Trainer) -> Iterator[None]:
    """If this rank fails, the ranks that it started do not go on waiting for it."""
    try:
        yield
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        raise


def restore_best(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Loads the weights with the best validation loss, and measures it again."""
    best = "best" if trainer.checkpoint_callback.best_model_path else None
    trainer.validate(module, data, ckpt_path=best, verbose=False)


def make_module(args: argparse.Namespace) -> FineTune:
    return FineTune(str(args.checkpoint), args.lr, args.warmup_steps, args.weight_decay, args.aux_loss)


def make_data(args: argparse.Namespace) -> TextBlocks:
    return TextBlocks(
        args.data, args.checkpoint, args.sequence_length, args.batch_size, args.val_fraction, args.output / "tokens"
    )


def make_trainer(args: argparse.Namespace, *callbacks: Callback) -> L.Trainer:
    """The Trainer. Only `strategy` is not what it would be on one device."""
    best = ModelCheckpoint(
        args.output / "checkpoints", "step{step}-loss{val/loss:.3f}", "val/loss", auto_insert_metric_name=False,
        save_last=True, save_on_train_epoch_end=False,
    )  # fmt: skip
    accelerator = args.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    monitors = [LearningRateMonitor("step"), MFUMonitor(), LoadBalanceMonitor(per_layer=False), FoldSummary()]
    in_steps = {}  # or else once per epoch
    if args.val_every:
        in_steps = {"val_check_interval": args.val_every * args.accumulate, "check_val_every_n_epoch": None}
    return L.Trainer(
        strategy=MoEFoldStrategy(fold=args.fold),
        accelerator=accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_steps=args.max_steps or -1,
        max_epochs=args.epochs if args.max_steps is None else -1,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip or None,
        log_every_n_steps=args.log_every,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        logger=make_loggers(args),
        callbacks=[best, *monitors, progress_display(), *callbacks],
        **in_steps,
    )


def make_loggers(args: argparse.Namespace) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(args.output, name="logs")]
    if args.wandb_project:
        wandb = WandbLogger(project=args.wandb_project, save_dir=args.output, offline=args.wandb_offline)
        wandb._wandb_init.pop("anonymous", None)  # Lightning always passes it, and W&B warns of it
        loggers.append(wandb)
    return loggers


# ---- arguments and their checks ----------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    nodes = int(os.environ["WORLD_SIZE"]) // local if "LOCAL_WORLD_SIZE" in os.environ else 1
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="model and tokenizer in Hugging Face format")
    add("--data", type=Path, required=True, nargs="+", metavar="FILE", help='.txt, or .jsonl with a field "text"')
    add("--output", type=Path, default=Path("runs/finetune"), metavar="DIR", help="where everything is written")
    add("--resume", type=Path, metavar="CKPT", help="checkpoint of an earlier run, saved under any fold")
    add("--fold", default="", help='parallel sizes, such as "tp2 | ep4"; the rest is data parallel')
    add("--devices", type=int, default=local, help="ranks on this node")
    add("--num-nodes", type=int, default=nodes, help="nodes")
    add("--accelerator", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where there is one")
    add("--precision", default="bf16-mixed", choices=["bf16-mixed", "bf16-true", "32-true"], help="of the computation")
    add("--lr", type=float, default=1e-4, help="learning rate after warm-up")
    add("--warmup-steps", type=int, default=10, help="steps of linear rise")
    add("--weight-decay", type=float, default=0.1, help="of matrices; norms and biases have none")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 for no clipping")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=int, help="optimizer steps (instead of epochs)")
    length.add_argument("--epochs", type=int, default=1, help="passes over the data")
    add("--batch-size", type=int, default=1, help="blocks in a batch of each data rank")
    add("--accumulate", type=int, default=1, help="batches per optimizer step")
    add("--sequence-length", type=int, default=1024, help="tokens in a block")
    add("--val-fraction", type=float, default=0.1, help="share of the blocks kept for validation")
    add("--val-every", type=int, help="optimizer steps between validations; a tenth of --max-steps, or an epoch")
    add("--log-every", type=int, default=10, help="optimizer steps between logged values")
    add("--aux-loss", action=argparse.BooleanOptionalAction, default=True, help="train with the load-balancing loss")
    add("--wandb-project", metavar="NAME", help="log to Weights & Biases too")
    add("--wandb-offline", action="store_true", help="keep its run on disk, to upload with `wandb sync`")
    add("--seed", type=int, default=1, help="of the order of the data")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    args = make_parser().parse_args(arguments)
    if args.val_every is None and args.max_steps:
        args.val_every = max(1, args.max_steps // 10)
    return args


def check_files(args: argparse.Namespace) -> None:
    """What can be checked without a Trainer.

    Raises:
        InputError: Naming the argument.
    """
    for name in ("devices", "num_nodes", "batch_size", "accumulate", "log_every", "epochs", "max_steps", "val_every"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val-fraction {args.val_fraction} must lie between 0 and 1.")
    if not (args.checkpoint / "config.json").is_file():
        raise InputError(f"--checkpoint {args.checkpoint} is no directory with a config.json.")
    for path in args.data:
        if not path.is_file():
            raise InputError(f"--data {path} is no file.")
    if args.resume is not None and not args.resume.exists():
        raise InputError(f"--resume {args.resume} does not exist.")


def check_fits(args: argparse.Namespace, world_size: int) -> None:
    """Whether the fold suits the ranks and the model, and the model the blocks.

    Raises:
        FoldError: Naming the rule.
        InputError: For a length.
    """
    config = MoEConfig.from_pretrained(args.checkpoint)
    fold = Fold.parse(args.fold, world_size)
    fold.validate(config)
    longest = config.raw.get("max_position_embeddings", args.sequence_length)
    if not 2 <= args.sequence_length <= longest:
        raise InputError(f"--sequence-length {args.sequence_length} must lie between 2 and the model's {longest}.")
    if rank_zero_only.rank == 0:
        batch = args.batch_size * fold.dp * args.accumulate
        print(f"{batch} blocks of {args.sequence_length} tokens per optimizer step", flush=True)


# ---- the terminal ------------------------------------------------------------------------------------------------


def quiet() -> None:
    """Silences what tells a reader of this script nothing: tips, device lists, advice on data loading."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers",  # the data is in memory
        ".*smaller than the logging interval",
        ".*Using `DistributedSampler` with the dataloaders",
        ".*sync_dist=True",  # the loss is that of all ranks already
        ".*isinstance.treespec, LeafSpec",  # between Lightning and torch, as the next
        ".*nn.functional.all_gather is deprecated",
        "Checkpoint directory .* exists and is not empty",
        ".*router_aux_loss_coef",  # --no-aux-loss
    ):
        warnings.filterwarnings("ignore", pattern)


def progress_display() -> Callback:
    return Bar() if sys.stdout.isatty() else ProgressLines()


class Bar(TQDMProgressBar):
    def get_metrics(self, *args: object) -> dict[str, object]:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


class ProgressLines(ProgressBar):
    """A line every few steps where there is no terminal to draw a bar in."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.shown = True, 0

    def disable(self) -> None:
        self.enabled = False  # Lightning calls it on all ranks but the first

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.global_step > self.shown:
            self._show(trainer, "train/loss")

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.state.fn == "fit":
            self._show(trainer, "val/loss")

    def _show(self, trainer: L.Trainer, name: str) -> None:
        self.shown = trainer.global_step
        if self.enabled:
            total = int(trainer.estimated_stepping_batches)
            print(f"step {self.shown:>4}/{total}   {name:<10} {trainer.callback_metrics[name]:.3f}", flush=True)


if __name__ == "__main__":
    main()
