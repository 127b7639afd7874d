# SPDX-License-Identifier: Apache-2.0
"""What a training step costs before and after pruning: a Qwen2-MoE of random weights in its three forms, on this CPU.

    OMP_NUM_THREADS=1 python benchmarks/compress.py [--ratios 0.4] [--rounds 3] [--experts 16] [--width 256] [--tokens 1024]

A step is forward, backward and AdamW. Rounds interleave the models, and each has one step before that is not counted. FLOPs are
those of a forward pass for a token, with the experts that calibration tokens chose and the width that each has. CPU seconds are
fair on a busy machine, where wall-clock time is not.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Clock, machine

from lightning_moefold import MoECausalLM
from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.pruning import prune
from lightning_moefold.compression.report import table
from lightning_moefold.compression.stream import CalibrationRows


def config(args: argparse.Namespace) -> dict[str, object]:
    """The model that is pruned."""
    return {
        "model_type": "qwen2_moe", "vocab_size": 4000, "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": args.experts, "num_experts_per_tok": args.top_k,
        "moe_intermediate_size": args.width, "shared_expert_intermediate_size": 2 * args.width, "intermediate_size": 256,
        "norm_topk_prob": True, "output_router_logits": True, "initializer_range": 0.1, "max_position_embeddings": 4096,
    }  # fmt: skip


def step_of(path: Path, rows: torch.Tensor) -> Callable[[], None]:
    """A training step of a model."""
    model = MoECausalLM.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()

    step()
    return step


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="shares of channels that are pruned")
    add("--rounds", type=int, default=3, help="steps of each model that count")
    add("--experts", type=int, default=16)
    add("--top-k", type=int, default=2)
    add("--width", type=int, default=256, help="of an expert; the shared one is twice as wide")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--tokens", type=int, default=1024, help="of a step, in rows of 256")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*router_aux_loss_coef")
    rows = torch.randint(0, 4000, (args.tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        MoECausalLM.from_config(config(args), seed=0).save_pretrained(folder / "original")
        energies = analyze(folder / "original", CalibrationRows(rows))
        whole = MoECausalLM.from_pretrained(folder / "original").config
        used = whole.num_hidden_layers * (args.top_k * args.width + 2 * args.width)
        flops = whole.forward_flops_per_token(256)
        costs = {"original": (whole.num_parameters(), flops, 0.0)}
        for ratio in args.ratios:
            for form in ("zeroed", "uniform", "packed"):
                path = f"{form} {ratio:.0%}"
                pruned = prune(folder / "original", energies, folder / path, ratio, form)
                lost = sum(pruned.lost.values()) / len(pruned.lost)
                saved = 0.0 if form == "zeroed" else pruned.flops[0] - pruned.flops[1]
                size = pruned.parameters[form != "zeroed"]
                costs[path] = size, flops - saved, lost
        assert abs(pruned.flops[0] - 6 * args.hidden * used) < 1
        steps, clocks = {path: step_of(folder / path, rows) for path in costs}, {path: Clock() for path in costs}
        for _ in range(args.rounds):
            for path, step in steps.items():
                clocks[path].measure(step)
        sizes = {path: sum(f.stat().st_size for f in (folder / path).glob("*.safetensors")) for path in costs}
    lines = [
        ["model", "parameters", "MB on disk", "MFLOPs a token", "energy lost", "CPU s/step", "ratio", "wall s/step"]
    ]
    base = clocks["original"].medians()["cpu"]
    for path, (parameters, work, lost) in costs.items():
        found = clocks[path].medians()
        lines.append(
            [
                path, f"{parameters / 1e6:.2f}M", f"{sizes[path] / 1e6:.1f}", f"{work / 1e6:.1f}", f"{lost:.2%}",
                f"{found['cpu']:.3f}", f"{found['cpu'] / base:.2f}", f"{found['wall']:.3f}",
            ]
        )  # fmt: skip
    print(machine())
    print(table(lines))


if __name__ == "__main__":
    main()
