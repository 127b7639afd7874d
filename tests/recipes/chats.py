# SPDX-License-Identifier: Apache-2.0
"""Conversations, and what each family makes of them, written by hand: the oracle of the chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
#: Parts of a text, and whether each is trained on.
Parts = list[tuple[str, bool]]

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And  one more?\nThink!"},
    {"role": "assistant", "content": "Three, I think."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "done"},
    {"role": "assistant", "content": "Two."},
]


def chat_tokenizer(folder: Path, template: str | None, bos: str | None = None, eos: str = "<|im_end|>") -> Path:
    """A byte-level tokenizer that makes tokens of several letters, with a template of this folder."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # so that anything merges
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["assistant\n\nWhat is one and one?\n\nThree, I think. Two." * 3], trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=bos)
    if template is not None:
        fast.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if "{" not in template else template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    """Rows as lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixtral(talk: list[dict[str, Any]], trained: set[int]) -> list[Parts]:
    """``<s> [INST] system, question [/INST] answer</s>``, without a header for answers."""
    parts: Parts = [("<s>", False)]
    system = ""
    for number, message in enumerate(talk):
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            parts.append((f" [INST] {system}{message['content']} [/INST]", False))
            system = ""
        else:
            parts.append((f" {message['content']}</s>", number in trained))
    return [parts]


def qwen2(talk: list[dict[str, Any]], trained: set[int]) -> list[Parts]:
    """ChatML with a system turn of its own where there is none; the line feed after a turn is never said."""
    parts: Parts = []
    if talk[0]["role"] != "system":
        parts.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False))
    for number, message in enumerate(talk):
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts.append((f"{message['content']}<|im_end|>", number in trained))
        parts.append(("\n", False))
    return [parts]


def qwen3(talk: list[dict[str, Any]], trained: set[int]) -> list[Parts]:
    """As many documents as turns are trained on; each ends with one, which alone has what was thought."""
    made = []
    for last in sorted(trained):
        parts: Parts = []
        for number, message in enumerate(talk[: last + 1]):
            thought, _, said = message["content"].rpartition("</think>")
            thought = thought.replace("<think>", "").strip("\n")
            parts.append((f"<|im_start|>{message['role']}\n", False))
            if number == last:
                parts.append((f"<think>\n{thought}\n</think>\n\n", True))
            parts.append((said.lstrip("\n") + "<|im_end|>", number == last))
            parts.append(("\n", False))
        made.append(parts)
    return made


def expected(tokenizer: Any, parts: Parts) -> tuple[list[int], list[bool]]:
    """Tokens until the last part that is trained on, one by one: one is, if the part that holds its first and its last letter is.

    Letters are found by decoding more and more tokens, not by offsets.
    """
    text = "".join(part for part, _ in parts)
    while parts and not parts[-1][1]:
        parts = parts[:-1]
    flags = [flag for part, flag in parts for _ in part] + [False] * len(text)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    trained, at = [], 0
    for number in range(len(tokens)):
        end = len(tokenizer.decode(tokens[: number + 1]))
        trained.append(all(flags[at:end]))
        at = end
    return tokens, trained
