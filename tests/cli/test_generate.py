# SPDX-License-Identifier: Apache-2.0
"""``moefold generate``: the texts are those of transformers for each prompt alone, whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.cli.main import main
from lightning_moefold.models.generation import StopStrings
from lightning_moefold.testing import hf_reference, make_checkpoint
from tests.recipes.chats import chat_tokenizer

TALK = [{"role": "user", "content": "How far is it?"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make_checkpoint(folder, "qwen2_moe", vocab_size=420)
    return chat_tokenizer(folder, "qwen2")


def run(path: Path, rows: str, *options: str, name: str = "prompts.txt") -> list[dict[str, str]]:
    prompts, output = path.parent / name, path.parent / "texts" / "out.jsonl"
    prompts.write_text(rows)
    command = ["generate", "--checkpoint", str(path), "--prompts", str(prompts), "--output", str(output)]
    status = main([*command, "--accelerator", "cpu", "--precision", "64-true", "--max-new-tokens", "6", *options])
    assert status == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def theirs(path: Path, text: str, **options: Any) -> str:
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer(text, **options)["input_ids"]])
    found = hf_reference(path).generate(input_ids=ids, do_sample=False, max_new_tokens=6)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_texts_of_prompts(path: Path) -> None:
    prompts = ["How far", "a", "is it far from here to the next house?"]
    expected = [theirs(path, prompt) for prompt in prompts]
    assert all(expected)
    for size in ("8", "2"):
        rows = run(path, "\n".join(prompts) + "\n", "--batch-size", size)
        assert rows == [{"prompt": p, "text": t} for p, t in zip(prompts, expected, strict=True)]
    stop = expected[2][2:4]
    stopped = run(path, "\n".join(prompts), "--stop", stop)
    assert [row["text"] for row in stopped] == [StopStrings((stop,)).cut(text) for text in expected]
    drawn = [run(path, "\n".join(prompts), "--sample", "--top-k", "50", "--seed", seed) for seed in ("1", "2", "1")]
    assert drawn[0] == drawn[2] != drawn[1]


def test_rows_with_conversations(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": TALK}, {"prompt": "a"}]
    found = run(path, "\n".join(map(json.dumps, rows)), name="prompts.jsonl")
    written = load_tokenizer(path).apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert [row["prompt"] for row in found] == [written, "a"]
    assert [row["text"] for row in found] == [theirs(path, written, add_special_tokens=False), theirs(path, "a")]


REFUSED = [
    ("prompts.txt", "a\n\nb", [], "line 2: there is no prompt"),
    ("prompts.txt", "", [], "holds no prompt"),
    ("prompts.jsonl", '{"prompt": "a"}\nb', [], "line 2: this is no JSON"),
    ("prompts.jsonl", '{"text": "a"}', [], "line 1: a row holds either"),
    ("prompts.txt", "a", ["--top-k", "3"], "add --sample"),
    ("prompts.txt", "a", ["--batch-size", "0"], "must be at least 1"),
    ("prompts.txt", "a", ["--stop", ""], "a stop string is empty"),
]


@pytest.mark.parametrize(("name", "rows", "options", "says"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(
    path: Path, name: str, rows: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = path.parent / name
    file.write_text(rows)
    command = ["generate", "--checkpoint", str(path), "--prompts", str(file), "--accelerator", "cpu", *options]
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_stop_strings() -> None:
    class Letters:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(ord("a") + token) for token in tokens)

    stop = StopStrings(("cd", "b"), Letters())
    stop.check()
    tokens = torch.tensor([[0, 2, 3], [0, 2, 4], [0, 1, 0], [0, 1, 0]])
    assert stop.complete(tokens, torch.tensor([True, True, True, False])).tolist() == [True, False, True, False]
    assert [stop.cut(text) for text in ("acd", "ace", "abcd")] == ["a", "ace", "a"]
    with pytest.raises(ValueError, match="need the tokenizer"):
        StopStrings(("a",)).check()
