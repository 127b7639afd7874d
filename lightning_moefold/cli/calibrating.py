# SPDX-License-Identifier: Apache-2.0
"""Arguments of commands that run calibration rows through a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.compression.calibration import read_calibration
from lightning_moefold.compression.ranks import run_on_ranks
from lightning_moefold.compression.stream import CalibrationRows

T = TypeVar("T")
_DTYPES = ("float32", "bfloat16", "float64")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the calibration rows, and where they run."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="model in Hugging Face format, or its name on the hub")
    add(
        "--data", required=True, nargs="+", metavar="FILE", help="calibration text or conversations, as for moefold fit"
    )
    add("--tokenizer", metavar="DIR", help="tokenizer, if it is not beside the model")
    add("--rows", type=int, default=128, help="calibration rows, drawn at random (128)")
    add("--length", type=int, default=2048, help="tokens of a row (2048)")
    add("--seed", type=int, default=0, help="of the draw (0)")
    add("--cache-dir", default=".moefold_tokens", metavar="DIR", help="where tokens are kept (.moefold_tokens)")
    add("--fold", default="", help='such as "| ep4"; layers are streamed, so pp shares rows as dp does')
    add("--ranks", type=int, default=1, help="CPU ranks to start (1); under torchrun its ranks are used")
    add("--dtype", choices=_DTYPES, default="float32", help="of weights and products; sums are float64 (float32)")
    add("--batch-size", type=int, default=1, help="rows of a forward pass (1)")


def calibration_of(arguments: argparse.Namespace) -> CalibrationRows:
    """Reads the rows that the arguments ask for."""
    tokenizer = arguments.tokenizer or local_directory(arguments.checkpoint, "tokenizer")
    rows = read_calibration(
        arguments.data, tokenizer, arguments.rows, arguments.length, arguments.seed, arguments.cache_dir
    )
    if len(rows.token_NS) < arguments.rows:
        print(
            f"the text has {len(rows.token_NS)} rows of {arguments.length} tokens, all of which are used.",
            file=sys.stderr,
        )
    return rows


def run_calibrated(work: Callable[..., T], arguments: argparse.Namespace) -> tuple[T, bool]:
    """Runs the work where and in the dtype that the arguments say, see :func:`~.ranks.run_on_ranks`."""
    return run_on_ranks(work, arguments.fold, arguments.ranks, getattr(torch, arguments.dtype), arguments.batch_size)
