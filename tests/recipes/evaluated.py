# SPDX-License-Identifier: Apache-2.0
"""Jobs for the ranks of the pool: tasks of lm-eval on local files."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.cli import evaluate
from tests.strategy.plain_modules import trainer

NUMBERS = "one two three four five six seven".split()  # noqa: SIM905


def make_tasks(folder: Path) -> Path:
    """Three tasks: a choice, the perplexity of texts, and generation; each of a local file."""
    folder.mkdir()
    rows = [
        {
            "question": f"What comes after {a}?",
            "choices": [b, a, "I think so, yes"],
            "answer": 0,
            "text": f"{a}, then {b}.",
        }
        for a, b in zip(NUMBERS, NUMBERS[1:], strict=False)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
    }
    tasks = {
        "next_choice": {
            "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean"}, {"metric": "acc_norm", "aggregation": "mean"}],
        },
        "next_text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "next_said": {
            "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))  # JSON is YAML
    return folder


def found(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model answered to each request of each task."""
    key = {name: "filtered_resps" if name == "next_said" else "resps" for name in results["samples"]}
    return {
        name: [sample[key[name]] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in results["samples"].items()
    }


def run(folder: str, fold: str, tasks: str) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Answers and metrics under a fold."""
    given = argparse.Namespace(
        checkpoint=Path(folder, "checkpoint"), tasks=tasks, include_path=Path(folder, "tasks"), batch_size=2, num_fewshot=None,
        limit=None, chat=False,
    )  # fmt: skip
    made = trainer(MoEFoldStrategy(fold=fold, num_microbatches=2), precision="32-true", use_distributed_sampler=False)
    with mock.patch.dict(
        os.environ, {"LOCAL_RANK": "0"}
    ):  # lm-eval returns results to the first rank of a machine only
        results = evaluate.evaluate(made, given)
    assert results is not None
    return found(results), {
        name: {key: value for key, value in metrics.items() if "stderr" not in key}
        for name, metrics in results["results"].items()
    }
