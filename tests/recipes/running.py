# SPDX-License-Identifier: Apache-2.0
"""A small run of examples/finetune.yaml on CPU ranks, and what it has logged."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "finetune.yaml"
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.distributed", "lightning.fabric.utilities.seed"
)  # fmt: skip


@contextmanager
def restored() -> Iterator[None]:
    """Puts back what a command sets for its process: the seed's variables, and which loggers are silent."""
    environment, levels = dict(os.environ), [logging.getLogger(name).level for name in _LOGGERS]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for name, level in zip(_LOGGERS, levels, strict=True):
            logging.getLogger(name).setLevel(level)


def arguments(folder: Path, output: Path, config: Path = CONFIG, **changes: object) -> list[str]:
    """Overrides that make examples/finetune.yaml a small run on CPU ranks; two underscores in a name stand for a dot."""
    values = {
        "trainer.strategy.init_args.fold": "tp2 | ep2", "trainer.devices": 2, "trainer.accelerator": "cpu",
        "trainer.precision": "32-true", "trainer.default_root_dir": output, "trainer.log_every_n_steps": 1,
        "model.checkpoint": folder / "checkpoint", "model.learning_rate": 1e-2,
        "data.files": json.dumps([str(folder / "b.jsonl")]), "data.tokenizer": folder / "checkpoint",
        "data.sequence_length": 64, "data.batch_size": 4, "data.cache_dir": folder / "tokens",
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return ["--config", str(config), *words]


def logged(output: Path, version: int | str) -> list[dict[str, str]]:
    name = f"version_{version}" if isinstance(version, int) else version
    with (output / "lightning_logs" / name / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
