# SPDX-License-Identifier: Apache-2.0
"""Prune a small model that is trained on the spot, in five ways of the same size, and heal what is left.

    python examples/heal.py --seeds 0 1 2 3 4

Each pruned model is trained for a few steps with the original as its teacher. The table shows the perplexity of the validation
text before and after, as the mean over the seeds with its standard deviation. Healing sees text, so the original is also trained
on in the same way, for comparison. To heal a large model under a fold, give the
original and the pruned directory to ``examples/distill.py`` as ``--teacher`` and ``--student``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo_data import read_python_topics, split_text, train_tokenizer
from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint import HFCheckpoint
from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.energies import Energies
from lightning_moefold.compression.expert_pruning import prune_experts, score_experts
from lightning_moefold.compression.pruning import prune
from lightning_moefold.compression.stream import CalibrationRows, Computing
from lightning_moefold.recipes import distillation_loss, top_log_probabilities

RATIOS = (0.2, 0.4, 0.6)
METHODS = ("CAMERA-P", "CAMERA-P uniform", "magnitude", "frequency", "REAP")
#: Ten experts, so that each ratio is a whole number of experts, and no shared one: all methods leave the same size, but for the
#: router's rows of experts that are gone.
CONFIG = {
    "model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 80, "num_local_experts": 10, "num_experts_per_tok": 2, "output_router_logits": True,
    "router_aux_loss_coef": 0.01, "max_position_embeddings": 128, "rope_theta": 10000.0, "dtype": "float32",
}  # fmt: skip


class Text:
    """Rows of training, calibration and validation text.

    Args:
        vocabulary: Number of tokens.
        length: Tokens of a row.
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        train, val = split_text(read_python_topics(), 0.9)
        self.tokenizer = train_tokenizer(train, vocabulary)
        self.train_NS, self.val_NS = (self._rows(part, length) for part in (train, val))

    def _rows(self, text: str, length: int) -> Tensor:
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        return ids[: len(ids) // length * length].view(-1, length)

    def batches(self, steps: int, rows: int, seed: int) -> Iterator[Tensor]:
        """Rows drawn at random, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self.train_NS[torch.randint(len(self.train_NS), (rows,), generator=generator)]


def train(
    model: MoECausalLM, batches: Iterator[Tensor], steps: int, rate: float, loss: Callable[[Tensor], Tensor]
) -> None:
    """Trains with AdamW, a short warm-up and a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1 - s / (steps + 1)))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def perplexity(model: MoECausalLM, text: Text) -> float:
    """Of the validation text."""
    model.eval()
    losses = [model(rows, labels=rows).lm_loss.item() * len(rows) for rows in text.val_NS.split(16)]
    return math.exp(sum(losses) / len(text.val_NS))


def magnitudes(checkpoint: Path, like: Energies) -> Energies:
    """Squared norm of the weights of each channel in place of its energy."""
    files, energy = HFCheckpoint(checkpoint), np.zeros_like(like.energy)
    for row, layer in enumerate(like.layers):
        for expert in range(energy.shape[1]):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            for part, dim in (("w1", 1), ("w3", 1), ("w2", 0)):
                energy[row, expert] += files.read(f"{name}{part}.weight", ()).double().square().sum(dim).numpy()
    return replace(like, energy=energy)


def prune_by(method: str, original: Path, output: Path, ratio: float, rows: CalibrationRows) -> None:
    """Writes the original without ``ratio`` of the parameters of its experts."""
    if method in ("frequency", "REAP"):
        prune_experts(original, score_experts(original, rows, score=method.lower()), output, 1 - ratio)
        return
    energies = analyze(original, rows, Computing(batch_size=8), ratio=ratio if method == "CAMERA-P" else None)
    if method == "magnitude":
        energies = magnitudes(original, energies)
    prune(original, energies, output, ratio, "uniform" if method == "CAMERA-P uniform" else "packed")


def experiment(seed: int, args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Perplexities of one seed: of the original, and of each method and ratio before and after healing."""
    text, rows = Text(args.vocabulary, args.length), args.batch_size
    special = {"vocab_size": len(text.tokenizer), "eos_token_id": text.tokenizer.eos_token_id}
    teacher = MoECausalLM.from_config(CONFIG | special, seed=seed)
    train(teacher, text.batches(args.steps, rows, seed), args.steps, 3e-3, lambda b: teacher(b, labels=b).loss)
    teacher.save_pretrained(folder / "original")
    found = {"original": [perplexity(teacher, text)]}
    parameters = teacher.config.num_parameters()
    print(f"seed {seed}: {parameters:,} parameters, perplexity {found['original'][0]:.2f}", flush=True)
    calibration = CalibrationRows(torch.cat(list(text.batches(1, args.rows, 1000 + seed))))
    distil = distillation_loss(0.5)

    def heal(student: MoECausalLM) -> float:
        def loss(batch: Tensor) -> Tensor:
            with torch.no_grad():
                logprobs, ids = top_log_probabilities(teacher(batch).logits, 32)
            extras = {"teacher_logprobs": logprobs, "teacher_ids": ids}
            return student(batch, labels=batch, loss_fn=distil, **extras).loss

        train(student, text.batches(args.heal_steps, rows, 2000 + seed), args.heal_steps, 1e-3, loss)
        return perplexity(student, text)

    found["original"].append(heal(MoECausalLM.from_pretrained(folder / "original", output_router_logits=True)))
    for method in METHODS:
        for ratio in RATIOS:
            prune_by(method, folder / "original", folder / "pruned", ratio, calibration)
            student = MoECausalLM.from_pretrained(folder / "pruned", output_router_logits=True)
            before, size = perplexity(student, text), student.config.num_parameters() / parameters
            after = heal(student)
            found[f"{method} {ratio:.0%}"] = [before, after]
            print(f"  {method:<16} {ratio:.0%}  {before:8.2f} -> {after:8.2f}   {size:.1%} of the size", flush=True)
    return found


def markdown(results: list[dict[str, list[float]]]) -> str:
    """The table: mean and standard deviation over seeds."""

    def cell(name: str, index: int) -> str:
        values = np.array([found[name][index] for found in results])
        return f"{values.mean():.1f} ± {values.std(ddof=1) if len(values) > 1 else 0:.1f}"

    head = " | ".join(f"{ratio:.0%} pruned | healed" for ratio in RATIOS)
    lines = [
        f"original: {cell('original', 0)}; trained on in the same way: {cell('original', 1)}",
        "",
        f"| method | {head} |",
        "|---" * (1 + 2 * len(RATIOS)) + "|",
    ]
    for method in METHODS:
        cells = [cell(f"{method} {ratio:.0%}", index) for ratio in RATIOS for index in (0, 1)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the experiment for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="one model each")
    add("--steps", type=int, default=300, help="training steps of the original")
    add("--heal-steps", type=int, default=40, help="steps of healing")
    add("--rows", type=int, default=32, help="calibration rows")
    add("--batch-size", type=int, default=8, help="rows of a batch")
    add("--length", type=int, default=128, help="tokens of a row")
    add("--vocabulary", type=int, default=1024, help="tokens of the vocabulary")
    add("--output", type=Path, help="file of results as JSON, written after each seed; those in it are kept")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*router_aux_loss_coef")
    start, results = time.perf_counter(), {}
    if args.output is not None and args.output.is_file():
        results = json.loads(args.output.read_text())
    for seed in args.seeds:
        if str(seed) not in results:
            with tempfile.TemporaryDirectory() as folder:
                results[str(seed)] = experiment(seed, args, Path(folder))
            if args.output is not None:
                args.output.write_text(json.dumps(results, indent=1))
    print(f"\n{markdown([results[str(seed)] for seed in args.seeds])}\n\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
