# SPDX-License-Identifier: Apache-2.0
"""Writes recipes/: configurations of `moefold fit` with the fold, the batch and the memory that the planner gives.

    python scripts/make_recipes.py

All parameters are trained where the planner finds room for them, otherwise an adapter on a base in bfloat16. Where that does
not fit either, there is no recipe, and the script says so.

Run it when the planner changes; tests/recipes/test_recipes.py compares what is there with what it would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lightning_moefold.planner.machine.hardware import find_hardware
from lightning_moefold.planner.report.recipe import strategy_arguments, trainer_arguments
from lightning_moefold.planner.search.job import Job
from lightning_moefold.planner.search.models_zoo import MODELS
from lightning_moefold.planner.search.robust import search
from lightning_moefold.planner.search.space import Space

FOLDER = Path(__file__).parents[1] / "recipes"
CHECKPOINTS = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen2-57b-a14b": "Qwen/Qwen2-57B-A14B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B-Base",
}
#: Sequences of an optimizer step, by number of GPUs.
BATCHES = {1: 16, 8: 64, 64: 256}
LENGTH = 4096
#: Ways to train, the best first. Without float32 copies, most updates of weights in bfloat16 would be lost.
WAYS: tuple[dict[str, Any], ...] = (
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true", "master_weights": True},
    {"precision": "bf16-true", "lora_rank": 16},
)


def recipe(model: str, gpus: int) -> str | None:
    """Returns the text of a recipe for the best way that fits; None if none does."""
    space = Space(largest_micro_batch=2)
    for way in WAYS:
        job = Job(MODELS[model], gpus, find_hardware("dgx-h100"), BATCHES[gpus], LENGTH, **way)
        best = search(job, space, 1, [job.routing]).best
        if best.fits:
            break
    else:
        return None
    arguments, trained = strategy_arguments(best), trainer_arguments(best)
    module: dict[str, Any] = {
        "checkpoint": CHECKPOINTS[model],
        "learning_rate": 1e-5 if job.lora_rank is None else 1e-4,
    }
    if job.master_weights:
        module["master_weights"] = True
    if job.lora_rank is not None:
        module["adapter"] = {"rank": job.lora_rank}
    what = "all parameters" if job.lora_rank is None else f"LoRA of rank {job.lora_rank} on attention"
    config: dict[str, Any] = {
        "trainer": {
            "strategy": {"class_path": "lightning_moefold.MoEFoldStrategy", "init_args": arguments},
            **trained, "max_epochs": 1,
            "gradient_clip_val": 1.0, "default_root_dir": f"runs/{model}",
        },
        "model": {
            "class_path": "lightning_moefold.recipes.FineTuneModule",
            "init_args": module,
        },
        "data": {
            "class_path": "lightning_moefold.recipes.TextData",
            "init_args": {
                "files": ["train.jsonl"], "tokenizer": CHECKPOINTS[model], "sequence_length": LENGTH,
                "batch_size": job.global_batch_size // trained.get("accumulate_grad_batches", 1),
            },
        },
    }  # fmt: skip
    head = (
        f"# {model} on {gpus} H100: {what}, {LENGTH} tokens a row, {job.global_batch_size} rows a step.\n"
        f"# The planner expects {best.mfu:.0%} MFU, {best.step_time:.1f} s a step and {best.memory.total / 1e9:.0f} of "
        f"{best.limit / 1e9:.0f} GB on the fullest GPU; not measured.\n"
        f"# {best.plan}\n#\n#     moefold fit --config recipes/{name_of(model, gpus)} --data.files '[my.jsonl]'\n\n"
    )
    return head + yaml.safe_dump(config, sort_keys=False)


def name_of(model: str, gpus: int) -> str:
    """Returns the name of a recipe's file."""
    return f"{model}-{gpus}xh100.yaml"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for model in CHECKPOINTS:
        for gpus in BATCHES:
            text, path = recipe(model, gpus), FOLDER / name_of(model, gpus)
            path.unlink(missing_ok=True)
            if text is None:
                print(f"{model} fits on {gpus} H100 in no way that is tried here, so there is no recipe.")
            else:
                path.write_text(text)


if __name__ == "__main__":
    main()
