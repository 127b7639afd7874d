"""Fine-tune a Mixture-of-Experts checkpoint on your own text, under any fold.

    python examples/finetune.py --checkpoint DIR --data a.txt b.jsonl --devices 4 --fold "tp2 | ep4"
    torchrun --nproc-per-node 4 examples/finetune.py --checkpoint DIR --data a.txt b.jsonl --fold "tp2 | ep4"

DIR is a Mixtral, Qwen2-MoE or Qwen3-MoE in Hugging Face format with its tokenizer. Under --output are afterwards
`model/` (Hugging Face format, the weights with the best validation loss), `checkpoints/` (to resume from, under this or
another fold and number of ranks), `logs/` (metrics.csv) and `tokens/`.

The module and the data are those that `moefold fit` uses; this script shows them with a Trainer of your own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_moefold import Fold, MoEConfig, MoEFoldStrategy
from lightning_moefold.callbacks import FoldSummary, LoadBalanceMonitor, MFUMonitor
from lightning_moefold.cli.terminal import peers_end_too, progress_display, quiet
from lightning_moefold.recipes import FineTuneModule, InputError, TextData, is_users

# ---- the run -----------------------------------------------------------------------------------------------------


def main() -> None:
    quiet()
    try:
        finetune(parse_arguments())
    except Exception as error:
        if not is_users(error):
            raise
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        sys.exit(f"finetune.py: {error}" if first else 1)


def finetune(args: argparse.Namespace) -> None:
    """Trains, then exports the weights with the best validation loss."""
    check_files(args)
    L.seed_everything(args.seed, verbose=False)
    trainer = make_trainer(args)
    fold = check_fits(args, trainer)
    data = make_data(args, fold)
    if trainer.is_global_zero:
        data.tokenize()  # before other ranks start, so that bad data is one message
    module = make_module(args)
    with peers_end_too(trainer):
        trainer.fit(module, data, ckpt_path=args.resume)
        restore_best(trainer, module, data)
        assert module.model is not None
        module.model.save_pretrained(args.output / "model")
    if trainer.is_global_zero:
        metrics = trainer.callback_metrics
        print(f"\nval/loss {metrics['val/loss']:.4f}, perplexity {metrics['val/perplexity']:.2f}")
        print(f"model, in Hugging Face format   {args.output / 'model'}")
        print(f"checkpoint to resume from       {args.output / 'checkpoints' / 'last.ckpt'}")
        print(f"metrics                         {trainer.loggers[0].log_dir}/metrics.csv")


def restore_best(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Loads the weights with the best validation loss, and measures it again, unless they are those of the last step."""
    checkpoints = trainer.checkpoint_callback
    assert isinstance(checkpoints, ModelCheckpoint)
    best = checkpoints.best_model_path
    if Path(best).name.startswith(f"step{trainer.global_step}-") and "val/loss" in trainer.callback_metrics:
        return
    trainer.loggers, loggers = [], trainer.loggers  # they have this loss
    trainer.validate(module, data, ckpt_path=best or None, verbose=False)
    trainer.loggers = loggers


def make_module(args: argparse.Namespace) -> FineTuneModule:
    return FineTuneModule(
        str(args.checkpoint), learning_rate=args.lr, warmup_steps=args.warmup_steps, weight_decay=args.weight_decay,
        aux_loss=args.aux_loss,
    )  # fmt: skip


def make_data(args: argparse.Namespace, fold: Fold) -> TextData:
    return TextData(
        [str(file) for file in args.data], str(args.checkpoint), args.sequence_length, args.batch_size * fold.dp,
        val_fraction=args.val_fraction, seed=args.seed, cache_dir=str(args.output / "tokens"),
    )  # fmt: skip


def make_trainer(args: argparse.Namespace, *callbacks: Callback) -> L.Trainer:
    """The Trainer. Only `strategy` is not what it would be on one device."""
    best = ModelCheckpoint(
        args.output / "checkpoints", "step{step}-loss{val/loss:.3f}", "val/loss", auto_insert_metric_name=False,
        save_last=True, save_on_train_epoch_end=False, enable_version_counter=False,
    )  # fmt: skip
    # Into the same last.ckpt, for the steps after the last validation.
    last = ModelCheckpoint(best.dirpath, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    accelerator = args.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    monitors = [LearningRateMonitor("step"), MFUMonitor(), LoadBalanceMonitor(per_layer=False), FoldSummary()]
    in_steps = {}  # or else once per epoch
    if args.val_every:
        in_steps = {"val_check_interval": args.val_every * args.accumulate, "check_val_every_n_epoch": None}
    return L.Trainer(
        strategy=MoEFoldStrategy(fold=args.fold, num_microbatches=args.num_microbatches),
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
        callbacks=[best, last, *monitors, progress_display(), *callbacks],
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
    add(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help='.txt, or .jsonl or .json with fields "text"',
    )
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
    add("--num-microbatches", type=int, help="micro-batches of a batch; a pipeline (pp in --fold) needs a number")
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


def check_fits(args: argparse.Namespace, trainer: L.Trainer) -> Fold:
    """The fold, if it suits the ranks and the model, and the model the blocks.

    Raises:
        FoldError: Naming the rule.
        InputError: For a length.
    """
    config = MoEConfig.from_pretrained(args.checkpoint)
    fold = Fold.parse(args.fold, trainer.world_size)
    fold.validate(config)
    longest = config.raw.get("max_position_embeddings", args.sequence_length)
    if not 2 <= args.sequence_length <= longest:
        raise InputError(f"--sequence-length {args.sequence_length} must lie between 2 and the model's {longest}.")
    if trainer.is_global_zero:
        batch = args.batch_size * fold.dp * args.accumulate
        print(f"{batch} blocks of {args.sequence_length} tokens per optimizer step", flush=True)
    return fold


if __name__ == "__main__":
    main()
