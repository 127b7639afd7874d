# SPDX-License-Identifier: Apache-2.0
"""Training an adapter: ours beside PEFT on Hugging Face's model, and beside our training of the whole model.

    python benchmarks/adapters.py [--experts 64] [--hidden 1024] [--width 512] [--rank 16] [--tokens 4096] [--rounds 2] ...

Each contender has processes of its own, in which it makes ``--steps`` steps after one that is not counted; rounds interleave the
contenders. All have the same Mixtral of random weights and the same tokens; adapters are on attention and on each expert. A step
is forward, backward and AdamW; "fwd+bwd" leaves out the last. Peak memory is the resident size of the process at its highest. CPU
seconds are of all threads, and fair on a busy machine where wall-clock time is not (``OMP_NUM_THREADS=1``).

``--ranks 2`` trains by Lightning on as many ranks, which share the tokens: PEFT under ``DDPStrategy``, ours with the experts
spread over the ranks (``| ep2``). Figures are then of a whole step, CPU seconds of all ranks together and memory of the fullest.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

PEFT, LORA, FULL = "PEFT + HF", "moefold LoRA", "moefold full"
CONTENDERS = (PEFT, LORA, FULL)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "mixtral", "vocab_size": 1000, "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts_per_tok": args.top_k,
        "num_local_experts": args.experts, "intermediate_size": args.width, "sliding_window": None,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip


def make(contender: str, args: argparse.Namespace) -> Any:
    dtype = getattr(torch, args.dtype)
    if contender == PEFT:
        from peft import LoraConfig, get_peft_model
        from transformers import MixtralConfig, MixtralForCausalLM

        fields = {k: v for k, v in config(args).items() if k != "model_type"}
        model = MixtralForCausalLM(MixtralConfig(**fields, experts_implementation="grouped_mm")).to(dtype)
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora = LoraConfig(r=args.rank, lora_alpha=32, target_modules=ATTENTION, target_parameters=parameters)
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    from lightning_moefold import MoECausalLM

    model = MoECausalLM.from_config(config(args), dtype=dtype)
    if contender == LORA:
        model.add_adapter({"rank": args.rank, "alpha": 32, "targets": [*ATTENTION, "experts"]})
    return model


def work(contender: str, args: argparse.Namespace) -> None:
    """One contender's steps; prints its figures."""
    torch.manual_seed(0)
    model = make(contender, args).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(1000, (args.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    passes, steps = [], []
    for _ in range(1 + args.steps):
        start = time.process_time(), time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        middle = time.process_time(), time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.process_time(), time.perf_counter()
        passes.append([b - a for a, b in zip(start, middle, strict=True)])
        steps.append([b - a for a, b in zip(start, end, strict=True)])
    figures = {
        "pass": [statistics.median(x) for x in zip(*passes[1:], strict=True)],
        "step": [statistics.median(x) for x in zip(*steps[1:], strict=True)],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "trained": sum(p.numel() for p in parameters),
    }
    print(json.dumps(figures))


class Steps(pl.LightningModule):
    """The steps of one contender on several ranks."""

    def __init__(self, contender: str, args: argparse.Namespace) -> None:
        super().__init__()
        self.contender, self.args = contender, args
        self.model: Any = None  # theirs or ours
        self.seconds: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            self.model = make(self.contender, self.args)

    def train_dataloader(self) -> Any:
        ids = torch.randint(1000, (self.args.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row} for row in ids]
        return DataLoader(rows * (1 + self.args.steps), batch_size=len(rows) // self.args.ranks)

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch).loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.start)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=True)


def work_together(contender: str, args: argparse.Namespace) -> None:
    """One contender's steps on several ranks; the first rank prints the figures."""
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_moefold import MoEFoldStrategy

    strategy = DDPStrategy() if contender == PEFT else MoEFoldStrategy(fold=f"| ep{args.ranks}")
    module = Steps(contender, args)
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.ranks, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    step = statistics.median(module.seconds[1:])
    mine = (step, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, trained_here(module))
    everyone: list[Any] = [None] * args.ranks
    torch.distributed.all_gather_object(everyone, mine)
    if trainer.is_global_zero:
        steps, peaks, counts = zip(*everyone, strict=True)
        seconds = [sum(steps)] * 2
        print(json.dumps({"pass": seconds, "step": seconds, "peak": max(peaks), "trained": max(counts)}))


def trained_here(module: pl.LightningModule) -> int:
    """Number of trained parameters of the whole model: a tensor in pieces has the shape of the whole."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("experts", 64), ("top-k", 4), ("hidden", 1024), ("width", 512), ("rank", 16), ("tokens", 4096), ("layers", 2),
        ("steps", 2), ("rounds", 2), ("ranks", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--worker", choices=CONTENDERS)
    args = parser.parse_args()
    if args.worker:
        (work if args.ranks == 1 else work_together)(args.worker, args)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            launcher = [] if args.ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}"]
            command = [sys.executable, *launcher, str(Path(__file__)), *sys.argv[1:], "--worker", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
    print(f"torch {torch.__version__}, {json.dumps(vars(args))}\n")
    print("| contender | trained | fwd+bwd CPU s | tokens/CPU s | speed | step CPU s | ratio to full | peak GB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    best = {
        name: {key: min(run[key][0] for run in runs) for key in ("pass", "step")}
        | {"peak": min(r["peak"] for r in runs)}
        for name, runs in found.items()
    }
    for name, of in best.items():
        print(
            f"| {name} | {found[name][0]['trained'] / 1e6:.1f}M | {of['pass']:.2f} | {args.tokens / of['pass']:.0f} | "
            f"{best[PEFT]['pass'] / of['pass']:.2f} | {of['step']:.2f} | {of['step'] / best[FULL]['step']:.2f} | {of['peak']:.2f} |"
        )


if __name__ == "__main__":
    main()
