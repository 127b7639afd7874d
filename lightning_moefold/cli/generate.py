# SPDX-License-Identifier: Apache-2.0
"""``moefold generate``: continues the prompts of a file, under a fold."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning_moefold.checkpoint.stores import check_file
from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.cli.one_step import add_run_arguments, make_trainer, run_once
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.texts import continue_texts
from lightning_moefold.recipes.conversation import Conversation, read_row
from lightning_moefold.recipes.documents import Raw, read_lines, read_rows


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_run_arguments(parser)
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="a prompt a line; .jsonl, .json, .parquet: rows with prompt or messages",
    )
    add("--adapter", type=Path, metavar="DIR", help="adapter in PEFT's format")
    add("--output", type=Path, metavar="FILE", help="where rows of prompt and text go as JSON lines (default: printed)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of each text (128)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts of a call, over all data ranks (8)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text, and is cut off (may be repeated)")
    add("--sample", action="store_true", help="draw tokens instead of taking the most probable one")
    add("--temperature", type=float, default=1.0, help="divides the logits (1.0)")
    add("--top-k", type=int, help="draw from this many tokens")
    add("--top-p", type=float, help="draw from the most probable tokens that have this probability together")
    add("--seed", type=int, default=0, help="of the draws (0); other --batch-size, other texts")


def run(arguments: argparse.Namespace) -> int:
    """Continues the prompts and writes or prints the texts; returns the exit status."""
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size} must be at least 1.")
    given = arguments.temperature != 1.0 or arguments.top_k is not None or arguments.top_p is not None
    if given and not arguments.sample:
        raise InputError("--temperature, --top-k and --top-p are for drawing tokens; add --sample.")
    if arguments.output is not None:
        check_file(arguments.output, "texts")
    tokenizer = cache(lambda: load_tokenizer(arguments.checkpoint))
    prompts = list(read_prompts(arguments.prompts, tokenizer))
    trainer = make_trainer(arguments)
    work = partial(_continue, prompts=prompts, tokenizer=tokenizer, arguments=arguments)
    texts = run_once(trainer, partial(_make, arguments), work)
    if trainer.is_global_zero:
        _write(prompts, texts, arguments.output)
    return 0


def read_prompts(path: Path, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yields each prompt, and whether the tokenizer is to add its special tokens, which a chat template writes itself.

    Args:
        path: A text file with a prompt a line, or one of :mod:`.documents` whose rows have ``prompt`` (text) or ``messages`` (a
            conversation, with ``tools`` and ``system`` beside it). Without an ending, as that of a pipe, it is text.
        tokenizer: Returns the tokenizer, whose chat template is used.

    Raises:
        InputError: Naming file and line.
    """
    found = False
    for raw in read_rows([path]) if path.suffix else [Raw(0, 0, path.name, lambda: "".join(read_lines(path)))]:
        row = raw.read()
        if not raw.number:  # a whole text
            for number, line in enumerate(row.removesuffix("\n").split("\n") if row else [], start=1):
                if not line.strip():
                    raise InputError(f"{path}, line {number}: there is no prompt; leave empty lines out.")
                found = True
                yield line, True
            continue
        found = True
        if not isinstance(row, dict) or isinstance(row.get("prompt"), str) == isinstance(row.get("messages"), list):
            raise InputError(f"{raw.where}: a row holds either a text 'prompt' or a list 'messages'.")
        if isinstance(row.get("prompt"), str):
            yield row["prompt"], True
        else:
            yield _conversation(row, tokenizer(), raw.where), False
    if not found:
        raise InputError(f"{path} holds no prompt; write one a line.")


def _conversation(row: dict[str, Any], tokenizer: Any, where: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"{where}: 'messages' need a chat template, which the tokenizer does not have; give 'prompt'.")
    talk = read_row(row, where, "messages")
    assert isinstance(talk, Conversation)
    try:
        return str(
            tokenizer.apply_chat_template(talk.messages, tools=talk.tools, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # of the template, which is a program
        raise InputError(f"{where}: the chat template refuses the messages: {error}") from error


def _make(arguments: argparse.Namespace) -> MoECausalLM:
    model = MoECausalLM.from_pretrained(arguments.checkpoint, output_router_logits=False, router_aux_loss_coef=0.0)
    if arguments.adapter is not None:
        model.load_adapter(arguments.adapter)
    return model


def _continue(
    model: MoECausalLM, prompts: list[tuple[str, bool]], tokenizer: Any, arguments: argparse.Namespace
) -> list[str]:
    options = {"max_new_tokens": arguments.max_new_tokens, "stop_strings": arguments.stop}
    if arguments.sample:
        options |= {"do_sample": True} | {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    texts: dict[int, str] = {}
    for special in (True, False):
        numbers = [number for number, (_, adds) in enumerate(prompts) if adds == special]
        for start in range(0, len(numbers), arguments.batch_size):
            batch = numbers[start : start + arguments.batch_size]
            found = continue_texts(
                model, [prompts[n][0] for n in batch], tokenizer, special_tokens=special, seed=arguments.seed + batch[0],
                **options,
            )  # fmt: skip
            texts |= dict(zip(batch, found, strict=True))
    return [texts[number] for number in range(len(prompts))]


def _write(prompts: list[tuple[str, bool]], texts: list[str], output: Path | None) -> None:
    rows = [{"prompt": prompt, "text": text} for (prompt, _), text in zip(prompts, texts, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        sys.stdout.write(lines)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(lines, encoding="utf-8")
