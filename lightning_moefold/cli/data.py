# SPDX-License-Identifier: Apache-2.0
"""``moefold data preview``: what a run will be trained on, row by row, before it starts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np

from lightning_moefold.arguments import check_count
from lightning_moefold.errors import InputError, is_users
from lightning_moefold.recipes.data import Part, TextData
from lightning_moefold.recipes.pairs import PreferenceData
from lightning_moefold.recipes.tokenizing import Encoder

#: Trained on, masked, and the line above a document; with and without colours.
_COLOURS = {"trained": ("\033[1;32m", "\033[0m"), "masked": ("\033[90m", "\033[0m"), "head": ("\033[36m", "\033[0m")}
_PLAIN = {"trained": ("⟦", "⟧"), "masked": ("", ""), "head": ("", "")}


def run(words: list[str]) -> int:
    """Prints rows and statistics; returns the exit status: 0, or 2 for an error of the user.

    Args:
        words: What follows ``data`` on the command line.
    """
    from lightning_moefold.cli.fit import _need_jsonargparse

    try:
        if words[:1] != ["preview"]:
            raise InputError(
                "what it can do is preview: moefold data preview --config FILE.yaml, or --data.KEY VALUE ..."
            )
        _need_jsonargparse()
        _preview(_parse(words[1:]))
    except BrokenPipeError:
        return 1
    except Exception as error:
        if not is_users(error):
            raise
        print(f"moefold data: {error}", file=sys.stderr)
        return 2
    return 0


def _preview(config: Any) -> None:
    data = config.data
    check_count("rows", config.rows, 0)
    if not isinstance(data, TextData) or isinstance(data, PreferenceData):
        raise InputError(f"data preview shows TextData, not {type(data).__name__}.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*conversations, ")  # the statistics say it
        data.prepare_data()
        data.setup("fit")
    coloured = sys.stdout.isatty() if config.color == "auto" else config.color == "always"
    part = data.part(config.part)
    if not len(part):
        raise InputError(f"there is nothing to preview for {config.part}; give {config.part}_files, or another --part.")
    for line in preview(part, Encoder(data.cache.reading).tokenizer, config.rows, _COLOURS if coloured else _PLAIN):
        print(line)
    print("\n".join(statistics(part)))


def _parse(words: list[str]) -> Any:
    """Reads the configuration of a run, of which the data alone is made."""
    from jsonargparse import ActionConfigFile

    from lightning_moefold.cli.fit import Parser

    parser = Parser(prog="moefold data preview")
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="configuration of a run, of which the data is read"
    )
    parser.add_argument("--rows", type=int, default=2, help="rows to show")
    parser.add_argument("--part", type=Literal["train", "val", "test", "predict"], default="train", help="which rows")
    parser.add_argument("--color", type=Literal["auto", "always", "never"], default="auto", help="of what is shown")
    for other in ("trainer", "model", "optimizer", "lr_scheduler"):
        parser.add_argument(f"--{other}", type=dict, default={}, help="not read")
    for other in ("seed_everything", "ckpt_path"):
        parser.add_argument(f"--{other}", default=None, help="not read")
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True)
    parser.set_defaults({"data": {"class_path": f"{TextData.__module__}.{TextData.__qualname__}"}})
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name in older versions
    return make(parser.parse_args(words))


def preview(part: Part, tokenizer: Any, rows: int, marks: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Lines that show the first rows.

    Args:
        part: The rows.
        tokenizer: Decodes them.
        rows: How many.
        marks: What stands before and after what is trained on, what is masked, and the line above a document.
    """

    def marked(kind: str, text: str) -> str:
        before, after = marks[kind]
        return f"{before}{text}{after}"

    legend = f"{marked('trained', 'trained on')}   {marked('masked', 'masked')}"
    yield f"{min(rows, len(part))} of {len(part):,} rows   {legend}"
    plan, store = part.rows.plan, part.rows.store
    for number in part.numbers[:rows].tolist():
        yield f"\nrow {number}"
        for piece in plan.pieces(number):
            begin, size, document = (int(x[piece]) for x in (plan.begin_P, plan.size_P, plan.document_P))
            tokens = store.tokens_T[begin : begin + size].tolist()
            flags = [True] * size if store.trained_T is None else store.trained_T[begin : begin + size].tolist()
            head = f"-- {store.name(document)}, document {document}: {size} tokens, {sum(flags)} trained on"
            yield marked("head", head)
            runs = groupby(zip(tokens, flags, strict=True), key=lambda pair: pair[1])
            yield "".join(
                marked("trained" if flag else "masked", tokenizer.decode([token for token, _ in run]))
                for flag, run in runs
            )


def statistics(part: Part) -> list[str]:
    """Lines on lengths, packing and labels."""
    rows, counts = part.rows, part.rows.store.counts
    lengths = np.asarray(rows.store.lengths_N)
    low, middle, high, most = np.percentile(lengths, [0, 50, 90, 100]).tolist()
    length, used = rows.plan.length, int(rows.plan.size_P.sum())
    lines = [
        "",
        f"read         {counts.rows:,} rows, of which {counts.chats:,} conversations; {counts.documents:,} documents",
        f"lengths      {low:,.0f} at least, {middle:,.0f} in the middle, {high:,.0f} for nine of ten, {most:,.0f} at most",
        f"packed       {len(rows):,} rows of {length:,} tokens ({len(part):,} here), {used / (len(rows) * length):.1%} filled",
        f"labels       {counts.trained:,} of {counts.tokens:,} tokens ({counts.trained / counts.tokens:.1%})",
    ]
    if counts.empty:
        lines.append(f"left out     {counts.empty:,} rows with an empty text")
    left_out = counts.unlabelled, rows.plan.cut, rows.plan.dropped
    if any(left_out):
        lines.append(
            "left out     {} conversations without anything to train on; {} cut to a row; {} with no label in its first row".format(
                *left_out
            )
        )
    return lines
