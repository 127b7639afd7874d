# SPDX-License-Identifier: Apache-2.0
"""``moefold eval``: tasks of lm-eval on a checkpoint, under a fold."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_moefold.checkpoint.stores import check_file
from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.cli.one_step import add_run_arguments, make_trainer, run_once
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoECausalLM


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_run_arguments(parser)
    add = parser.add_argument
    add("--tasks", required=True, help="tasks of lm-eval, with commas between them")
    add("--include-path", type=Path, metavar="DIR", help="folder with tasks of your own (.yaml)")
    add("--batch-size", type=int, default=8, help="rows of a call on each data rank")
    add("--num-fewshot", type=int, help="examples in a context, if not as the task says")
    add("--limit", type=float, help="examples of each task, or below 1 a share of them")
    add("--chat", action="store_true", help="write contexts with the tokenizer's chat template")
    add("--output", type=Path, metavar="FILE", help="results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints a table; returns the exit status."""
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size} must be at least 1.")
    limit = arguments.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise InputError(
            f"--limit {limit:g} must be a whole number of examples, at least 1, or a share between 0 and 1."
        )
    if arguments.output is not None:
        check_file(arguments.output, "results")
    need_lm_eval()
    trainer = make_trainer(arguments)
    results = evaluate(trainer, arguments)
    if trainer.is_global_zero and results is not None:
        from lm_eval.utils import make_table

        print(make_table(results))
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results["results"], indent=2, default=str) + "\n")
    return 0


def need_lm_eval() -> None:
    """Refuses to go on without lm-eval.

    Raises:
        InputError: If it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError(
            "tasks are those of lm-eval, which is not installed; pip install 'lightning-moefold[eval]'."
        ) from None


def evaluate(trainer: pl.Trainer, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the tasks on all ranks of a Trainer; returns the results on the first rank of each machine, and None on the others."""

    def make() -> MoECausalLM:
        return MoECausalLM.from_pretrained(arguments.checkpoint, output_router_logits=False, router_aux_loss_coef=0.0)

    results: dict[str, Any] | None = run_once(trainer, make, partial(_run_tasks, arguments))
    return results


def _run_tasks(arguments: argparse.Namespace, model: MoECausalLM) -> dict[str, Any] | None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lightning_moefold.recipes.evaluation import FoldLM

    given, path = arguments, arguments.include_path
    tasks = [name.strip() for name in given.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=None if path is None else str(path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise InputError(
            f"lm-eval knows no task {', '.join(map(repr, unknown)) or 'without a name'}; `lm-eval ls tasks` lists them, and "
            "--include-path adds a folder of your own."
        )
    evaluated = FoldLM(model, load_tokenizer(given.checkpoint), given.batch_size, str(given.checkpoint))
    limit = given.limit if given.limit is None or given.limit < 1 else int(given.limit)
    results: dict[str, Any] | None = simple_evaluate(
        evaluated, tasks=tasks, num_fewshot=given.num_fewshot, limit=limit, task_manager=manager, log_samples=True,
        apply_chat_template=given.chat, bootstrap_iters=1000,
    )  # fmt: skip
    return results
