# SPDX-License-Identifier: Apache-2.0
"""``moefold generate``: the texts are those of transformers for each prompt alone, whatever the batches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.cli.generate import read_prompts
from lightning_moefold.cli.main import main
from lightning_moefold.models.generation import StopStrings
from lightning_moefold.testing import hf_reference, make_checkpoint
from tests.recipes.chats import TOOLS, chat_tokenizer

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
    assert [row["text"] for row in stopped] == [text.partition(stop)[0] for text in expected]
    drawn = [run(path, "\n".join(prompts), "--sample", "--top-k", "50", "--seed", seed) for seed in ("1", "2", "1")]
    assert drawn[0] == drawn[2] != drawn[1]


def test_rows_with_conversations(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": TALK}, {"prompt": "a"}]
    found = run(path, "\n".join(map(json.dumps, rows)), name="prompts.jsonl")
    written = load_tokenizer(path).apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert [row["prompt"] for row in found] == [written, "a"]
    assert [row["text"] for row in found] == [theirs(path, written, add_special_tokens=False), theirs(path, "a")]


def test_prompts_are_lines_whatever_they_hold(tmp_path: Path) -> None:
    texts, rows = ["a\u2028b", "c\x0cd\x85e"], [{"prompt": "a\u2028b"}, {"prompt": "c\x0cd\x85e"}]
    wanted = [(text, True) for text in texts]
    for name in ("prompts.txt", "prompts.TXT", "prompts"):
        (tmp_path / name).write_text("\ufeff" + "\r\n".join(texts) + "\r\n", encoding="utf-8", newline="")
        assert list(read_prompts(tmp_path / name, None)) == wanted, name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name in ("prompts.jsonl", "prompts.ndjson", "prompts.JSONL"):
        (tmp_path / name).write_text("\ufeff" + lines, encoding="utf-8")
        assert list(read_prompts(tmp_path / name, None)) == wanted, name
    with gzip.open(tmp_path / "prompts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    for name in ("prompts.jsonl.gz", "prompts.json"):
        assert list(read_prompts(tmp_path / name, None)) == wanted, name


def test_templates_are_given_the_tools_and_the_system_message(path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TALK, "tools": TOOLS}) + "\n")
    [(text, adds)] = read_prompts(tmp_path / "rows.jsonl", lambda: tokenizer)
    assert not adds
    assert json.loads(text.removesuffix(TALK[0]["content"])) == TOOLS
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TALK, "system": "Be brief."}) + "\n")
    assert next(iter(read_prompts(tmp_path / "rows.jsonl", lambda: tokenizer)))[0].endswith(
        "Be brief." + TALK[0]["content"]
    )


REFUSED = [
    ("prompts.csv", "a", [], "text is taken from"),
    ("prompts.jsonl", json.dumps({"messages": [{"role": "me", "content": "a"}]}), [], "has the role 'me'"),
    ("prompts.txt", "a\n\nb", [], "line 2: there is no prompt"),
    ("prompts.txt", "", [], "holds no prompt"),
    ("prompts.jsonl", '{"prompt": "a"}\nb', [], "line 2 is not a JSON object"),
    ("prompts.jsonl", '{"text": "a"}', [], "line 1: a row holds either"),
    ("prompts.txt", "a", ["--top-k", "3"], "add --sample"),
    ("prompts.txt", "a", ["--batch-size", "0"], "must be at least 1"),
    ("prompts.txt", "a", ["--stop", ""], "a stop string is empty"),
]


def test_an_output_that_cannot_be_written_is_refused_first(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a")
    monkeypatch.setattr("lightning_moefold.cli.generate.run_once", lambda *_: pytest.fail("texts were generated"))
    command = [
        "generate",
        "--checkpoint",
        str(path),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--accelerator",
        "cpu",
    ]
    for output, says in ((tmp_path, "it is a directory"), (tmp_path / "prompts.txt" / "out.jsonl", "is a file")):
        assert main([*command, "--output", str(output)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_an_accelerator_that_is_not_there_is_one_sentence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "prompts.txt").write_text("a")
    command = ["generate", "--checkpoint", str(path), "--prompts", str(path.parent / "prompts.txt")]
    assert main([*command, "--accelerator", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moefold generate: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("name", "rows", "options", "says"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(
    path: Path, name: str, rows: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = path.parent / name
    file.write_text(rows)
    command = ["generate", "--checkpoint", str(path), "--prompts", str(file), "--accelerator", "cpu", *options]
    assert main(command) == 2
    assert says in capsys.readouterr().err


class Letters:
    """A letter a token; the last of the alphabet is a special one."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        letters = "".join(chr(ord("a") + token) for token in tokens)
        return letters.replace("z", "") if skip_special_tokens else letters.replace("z", "<z>")


def test_stop_strings() -> None:
    stop = StopStrings(("cd", "b", "<z>"), Letters())
    stop.check()
    tokens = torch.tensor([[0, 2, 3], [0, 2, 4], [0, 1, 0], [0, 1, 0], [0, 25, 4]])
    wanted = torch.tensor([True, True, True, False, True])
    assert stop.complete(tokens, wanted).tolist() == [True, False, True, False, True]
    assert [stop.cut(row) for row in tokens.tolist()] == ["a", "ace", "a", "a", "a"]
    assert StopStrings(("e",), Letters()).cut([0, 25, 2, 4, 2]) == "ac", "without the special token"
    with pytest.raises(ValueError, match="need the tokenizer"):
        StopStrings(("a",)).check()


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_end|>", "Twö 你."),
        ("im_end", "Twö 你."),  # cuts the special token
        (".<|im_end|>\n", "Twö 你"),
        ("<|im_start|>user", "Twö 你.\n"),
        ("assistant", "Twö 你.\nuser"),
        ("ö", "Tw"),
        ("你", "Twö "),
        ("wö", "T"),
        ("<|endoftext|>", "Twö 你.\nuserassistant"),
    ],
)
def test_special_tokens_stop_and_are_left_out(path: Path, stop: str, text: str) -> None:
    tokenizer = load_tokenizer(path)
    said = "Twö 你.<|im_end|>\n<|im_start|>user<|im_start|>assistant"
    tokens = tokenizer(said, add_special_tokens=False)["input_ids"]
    stops = StopStrings((stop,), tokenizer)
    assert stops.complete(torch.tensor([tokens]), torch.tensor([True])).tolist() == [stop in said]
    assert stops.cut(tokens) == text
