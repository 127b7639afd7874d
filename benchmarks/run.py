# SPDX-License-Identifier: Apache-2.0
"""Training steps side by side in one run: medians over rounds, and ratios to Hugging Face under plain Lightning.

    python benchmarks/run.py [--family mixtral] [--ranks 1 2] [--rounds 3] [--precision 32-true] ...

Each contender runs in processes of its own, so that peak memory is its own; rounds interleave the contenders, so that a
busy machine hits them alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from measuring import machine, run_worker

CONTENDERS = {
    1: {"HF, Lightning": "hf", "moefold": "moefold"},
    2: {"HF, DDP": "hf", "HF, FSDP2": "hf-fsdp2", "moefold dp2 | edp2": "moefold:", "moefold dp2 | ep2": "moefold:ep2",
        "moefold tp2 | ep2": "moefold:tp2 | ep2"},
}  # fmt: skip
FAMILIES = {"qwen2_moe": "Qwen2-MoE", "mixtral": "Mixtral"}


def write_checkpoint(path: Path, args: argparse.Namespace) -> int:
    """A random model; returns its number of parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    common = {
        "vocab_size": args.vocab, "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_experts_per_tok": args.top_k,
    }  # fmt: skip
    if args.family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**common, intermediate_size=args.ffn, num_local_experts=args.experts))
    else:
        model = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **common, intermediate_size=args.ffn, moe_intermediate_size=args.ffn, num_experts=args.experts,
                shared_expert_intermediate_size=2 * args.ffn,
            )
        )  # fmt: skip
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


def run(contender: str, world: int, checkpoint: Path, args: argparse.Namespace) -> dict[str, float]:
    words = [contender, "--checkpoint", str(checkpoint), "--rows", str(args.rows), "--length", str(args.length),
             "--steps", str(args.steps), "--precision", args.precision]  # fmt: skip
    return run_worker("step.py", words, ranks=world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 3), ("steps", 6), ("rows", 4), ("length", 512), ("hidden", 512), ("layers", 4), ("ffn", 704),
                          ("experts", 16), ("top-k", 2), ("vocab", 16000)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_moe")
    parser.add_argument("--ranks", type=int, nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        parameters = write_checkpoint(checkpoint, args)
        print(
            f"{FAMILIES[args.family]}, {parameters / 1e6:.1f}M parameters, {args.experts} experts top-{args.top_k}, "
            f"{args.rows} rows of {args.length} tokens per rank, {args.precision}, AdamW (fused), "
            f"median of {args.rounds} rounds of {args.steps} steps"
        )
        print(f"{machine()}\n")
        print("| ranks | contender | tokens/s | ratio | CPU s/step | ratio | peak GB/rank | ratio |")
        print("|--:|---|--:|--:|--:|--:|--:|--:|")
        for world in args.ranks:
            contenders = CONTENDERS[world]
            rounds = [
                {name: run(c, world, checkpoint, args) for name, c in contenders.items()} for _ in range(args.rounds)
            ]
            base = None
            for name in contenders:
                figures = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
                base = base or figures
                print(f"| {world} | {name} | {figures['tokens_per_second']:.0f} | "
                      f"{figures['tokens_per_second'] / base['tokens_per_second']:.2f} | {figures['cpu_seconds']:.2f} | "
                      f"{figures['cpu_seconds'] / base['cpu_seconds']:.2f} | {figures['peak_gb']:.2f} | "
                      f"{figures['peak_gb'] / base['peak_gb']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
