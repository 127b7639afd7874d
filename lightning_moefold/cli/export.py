# SPDX-License-Identifier: Apache-2.0
"""``moefold export``: arguments and printing."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_moefold.models.export import DTYPES, export


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moefold export``."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="directory that the Trainer has saved, here or in a store")
    add("--output", required=True, metavar="DIR", help="directory to write; one with a model is replaced")
    add("--model", type=Path, metavar="DIR", help="where the tokenizer is (default: that of the training)")
    add("--dtype", choices=DTYPES, help="of the weights on disk (default: that of the model training began with)")


def run(arguments: argparse.Namespace) -> int:
    """Runs ``moefold export``."""
    merged = export(arguments.checkpoint, arguments.output, arguments.model, arguments.dtype)
    print(f"{arguments.output} can be loaded by transformers.")
    if merged:
        print("The adapter is merged into its weights.")
    return 0
