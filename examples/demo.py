"""The main job on CPU ranks, end to end, in a few minutes and without a network.

    python examples/demo.py

Writes a small Qwen2-MoE with random weights, trains it on English text under a fold (by default four ranks: attention
tp2 dp2, experts ep4), exports it to Hugging Face format, and checks that `transformers` computes the same logits from
the export as the ranks did together. The module, the data and the Trainer are those of finetune.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each rank; torch reads it on import
os.environ.setdefault("WANDB_SILENT", "true")

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import finetune
from lightning_moefold import Fold
from lightning_moefold.callbacks import GenerateSamples
from lightning_moefold.cli.terminal import peers_end_too, quiet
from lightning_moefold.recipes import FineTuneModule, TextData, is_users

ROOT = Path(__file__).resolve().parent.parent
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.08}  # learns the most in a minute on a CPU
PROMPT = "The statement"


def main() -> None:
    options = parse_options()
    quiet()
    args = finetune.parse_arguments(
        [
            *("--checkpoint", f"{options.output}/checkpoint", "--data", f"{options.output}/python_topics.txt"),
            *("--output", f"{options.output}/run", "--fold", options.fold, "--devices", str(options.devices)),
            *("--accelerator", "cpu", "--precision", "32-true", "--lr", "6e-3", "--warmup-steps", "10"),
            *("--max-steps", str(options.steps), "--val-every", str(max(1, options.steps // 4))),
            *("--log-every", str(max(1, min(10, options.steps // 4)))),
            *("--batch-size", "4", "--sequence-length", "128", "--wandb-project", "demo", "--wandb-offline"),
        ]
    )
    if "LOCAL_RANK" not in os.environ:  # the process that starts the others
        prepare(options.output, args)
    try:
        demo(args)
    except Exception as error:
        if not is_users(error):
            raise
        sys.exit(f"demo.py: {error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fold", default="tp2 | ep4", help="parallel sizes (%(default)s)")
    parser.add_argument("--devices", type=int, default=4, help="CPU ranks (%(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo", help="where everything is written")
    options = parser.parse_args()
    options.output = Path(os.path.relpath(options.output))
    return options


def prepare(output: Path, args: argparse.Namespace) -> None:
    """Text, tokenizer and checkpoint, and nothing left of an earlier run."""
    import demo_data  # here, as transformers takes seconds to import

    hide_progress_of_transformers()
    heading("1. A small Qwen2-MoE with random weights, and English text about Python")
    demo_data.write_demo_checkpoint(args.checkpoint, vocab_size=2048, **SHAPE)
    text = demo_data.read_python_topics()
    args.data[0].write_text(text, encoding="utf-8")
    shutil.rmtree(args.output, ignore_errors=True)
    print(f"{args.checkpoint}   {args.data[0]} ({len(text):,} characters)")


def demo(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    L.seed_everything(args.seed, verbose=False)
    losses = TrainLosses()
    samples = GenerateSamples([PROMPT], do_sample=True, temperature=0.7, top_k=20)
    trainer = finetune.make_trainer(args, losses, samples)
    if trainer.global_rank == 0:
        heading(f"2. Training on {args.devices} ranks")
    fold = finetune.check_fits(args, trainer)
    data, module = finetune.make_data(args, fold), finetune.make_module(args)
    with peers_end_too(trainer):
        trainer.validate(module, data, verbose=False)
        untrained = trainer.callback_metrics["val/loss"].item()
        trainer.fit(module, data)
        finetune.restore_best(trainer, module, data)
        logits = folded_logits(module, data)
        memory = module.all_gather(torch.tensor(peak_memory()))
        assert isinstance(memory, Tensor)
        assert module.model is not None
        module.model.save_pretrained(args.output / "model")
    if trainer.is_global_zero:
        seconds = time.monotonic() - begin
        summarize(trainer, fold, losses.values, untrained, memory.view(-1).tolist(), seconds)
        row("generated", " ".join("".join(samples.samples[0]).split()))
        check_export(args, probe(data), logits)
        say_what_next(args, trainer)


class TrainLosses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


# ---- what the ranks compute together ---------------------------------------------------------------------------


def probe(data: TextData) -> Tensor:
    """Two blocks that no training has seen."""
    return data.part("val").take(torch.arange(2))[0]


@torch.no_grad()
def folded_logits(module: FineTuneModule, data: TextData) -> Tensor:
    """Logits of the probe from the model as it lies on the ranks. Collective."""
    assert module.model is not None
    return module.model.eval()(probe(data), gather_logits=True).logits


def peak_memory() -> float:
    """Largest resident size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- what the first rank does with the export --------------------------------------------------------------------


def check_export(args: argparse.Namespace, probe_BL: Tensor, folded_BLV: Tensor) -> None:
    """Loads the export with `transformers` and compares it with the fold; raises if they disagree."""
    from transformers import AutoModelForCausalLM

    hide_progress_of_transformers()
    heading("4. The export, in transformers")
    model = AutoModelForCausalLM.from_pretrained(args.output / "model")
    with torch.no_grad():
        error_BL = (model(probe_BL).logits - folded_BLV).abs().amax(-1)
    row("logits, ranks - transformers", f"at most {error_BL.max():.1e} (of {folded_BLV.abs().max():.1f})")
    # In float32 the router may hold two experts of a token for equal, and choose either; once in thousands of tokens.
    if (error_BL < 1e-3).float().mean() < 0.99:
        raise AssertionError("transformers computes other logits from the export than the ranks did")


def hide_progress_of_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


# ---- what is printed ---------------------------------------------------------------------------------------------


def summarize(
    trainer: L.Trainer, fold: Fold, train_losses: list[float], untrained: float, memory: list[float], seconds: float
) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare them
    figures = {k: v for c in callbacks for k, v in getattr(c, "latest", {}).items()}
    last = train_losses[-10:]
    heading("3. What happened")
    print(fold.table(), end="\n\n")
    row(
        "train/loss", f"{train_losses[0]:.2f} -> {sum(last) / len(last):.2f} (first step, mean of the last {len(last)})"
    )
    row("val/loss", f"{untrained:.2f} -> {trainer.callback_metrics['val/loss']:.2f} (untrained, best)")
    if "train/tokens_per_second" in figures:  # of intervals without a start-up: a very short run has none
        row("tokens per second", f"{figures['train/tokens_per_second']:,.0f}")
        row("MFU", f"{figures['train/mfu']:.1%} of the matrix product rate measured on these ranks")
        row("seconds per step", f"{figures['train/step_time']:.2f}")
    row("load imbalance", f"{figures['moe/load_imbalance']:.2f} (busiest expert / mean; 1 is balanced)")
    row("peak memory", " ".join(f"{m / 1e6:.0f}" for m in memory) + " MB on ranks 0, 1, ...")
    row("time", f"{seconds:.0f} s with start-up, validation and checkpoints")


def say_what_next(args: argparse.Namespace, trainer: L.Trainer) -> None:
    heading("5. Where everything lies, and what to try next")
    row("model", f"{args.output}/model (Hugging Face format)")
    row("checkpoints", f"{args.output}/checkpoints")
    row("metrics", os.path.relpath(f"{trainer.loggers[0].log_dir}/metrics.csv"))
    row("pictures of the run", f"{os.path.relpath(sys.executable)} -m lightning_moefold plot {args.output}")
    row("Weights & Biases", f"wandb sync {args.output}/wandb/offline-run-*")
    print(
        f"\nYour own text, on the exported model, under another fold:\n\n"
        f"  {os.path.relpath(sys.executable)} examples/finetune.py --checkpoint {args.output}/model \\\n"
        f'      --data my.txt --devices 4 --fold "tp4 | ep2" --sequence-length 128 --precision 32-true\n'
    )


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def row(name: str, value: str) -> None:
    print(f"{name:<30}{value}", flush=True)


if __name__ == "__main__":
    main()
