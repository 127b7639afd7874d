# SPDX-License-Identifier: Apache-2.0
"""From files to rows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lightning_moefold.recipes import InputError, TextData
from lightning_moefold.recipes.text import PADDING, cut_blocks, pack_documents, tokenize


def documents(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(3)
    return [[1000 * n + i for i in range(draw.randint(1, longest))] for n in range(count)]


def test_blocks_are_the_text_in_order():
    text = documents(20, 30)
    rows = cut_blocks(text, [], 16)
    flat = [token for document in text for token in document]
    assert rows.token_NL.flatten().tolist() == flat[: len(flat) // 16 * 16]
    assert torch.equal(rows.document_NL.long(), rows.token_NL // 1000)


def test_packed_documents_are_whole():
    text = documents(40, 50)
    rows = pack_documents(text, [], 16)
    found: dict[int, list[int]] = {}
    pieces = 0
    for token_L, document_L in zip(rows.token_NL.tolist(), rows.document_NL.tolist(), strict=True):
        in_row = [d for d in document_L if d != PADDING]
        assert document_L == in_row + [PADDING] * (16 - len(in_row))
        assert len(set(in_row)) == sum(a != b for a, b in zip([None, *in_row], in_row, strict=False))
        pieces += len(set(in_row))
        for token, document in zip(token_L, document_L, strict=True):
            if document != PADDING:
                assert token // 1000 == document
                found.setdefault(document, []).append(token)
    expected = {}
    for number, document in enumerate(text):
        kept = document[: -1 if len(document) % 16 == 1 else None]  # a last piece of one token predicts nothing
        if kept:
            expected[number] = kept
    assert {number: sorted(tokens) for number, tokens in found.items()} == expected
    assert pieces == sum(-(-len(document) // 16) for document in expected.values())  # none cut that fits
    assert (rows.document_NL != PADDING).float().mean() > 0.95


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"a few words", "fewer than one row"),
        ("latin.txt", "na\xefve".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"words": "two"}', "line 2 is not"),
        ("b.jsonl", b'{"text": 3}', "line 1 is not"),
    ],
)
def test_wrong_text(folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokenize([tmp_path / name], folder / "checkpoint", 64, "blocks")


def test_wrong_tokenizer(folder, tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenize([folder / "a.txt"], tmp_path, 64, "blocks")
    (tmp_path / "config.json").write_text((folder / "checkpoint" / "config.json").read_text())
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenize([folder / "a.txt"], tmp_path, 64, "blocks")
    AutoTokenizer.from_pretrained(folder / "checkpoint").save_pretrained(tmp_path)
    config = (folder / "checkpoint" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 320', '"vocab_size": 300'))
    with pytest.raises(InputError, match="only 300 tokens"):
        tokenize([folder / "a.txt"], tmp_path, 64, "blocks")


def test_documents_end_with_the_end_of_text(folder, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\u2028line"}\n\n{"text": "two"}\n', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    rows = tokenize([file], folder / "checkpoint", 2, "blocks")
    text = tokenizer.decode(rows.token_NL.flatten().tolist())
    assert "one\u2028line<|endoftext|>two<|endoftext|>".startswith(text)
    assert "<|endoftext|>tw" in text
    assert rows.names == ["a.jsonl:1", "a.jsonl:3"]


def data(folder: Path, cache: Path, files: list[str], **changes: object) -> TextData:
    made = TextData(
        [str(folder / f) for f in files], str(folder / "checkpoint"), 64, 4, cache_dir=str(cache), **changes
    )
    made.prepare_data()
    made.setup("fit")
    return made


def test_every_tenth_row_is_for_validation(folder, tmp_path):
    made = data(folder, tmp_path, ["a.txt"])
    train, val = made.part("train").numbers.tolist(), made.part("val").numbers.tolist()
    assert len(val) == (len(train) + len(val)) // 10
    assert sorted([*train, *val]) == list(range(len(train) + len(val)))
    assert len(made.part("test")) == len(made.part("predict")) == len(val)


def test_text_is_tokenised_once_for_the_same_files_and_settings(folder, tmp_path):
    data(folder, tmp_path, ["a.txt"], val_files=[str(folder / "c.jsonl")])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 2
    data(folder, tmp_path, ["a.txt"], val_files=[str(folder / "c.jsonl")], seed=9, shuffle=False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    data(folder, tmp_path, ["a.txt"], packing="documents")
    assert len(list(tmp_path.iterdir())) == 3


def test_packed_batches(folder, tmp_path):
    made = data(folder, tmp_path, ["b.jsonl"], packing="documents", val_files=[str(folder / "c.jsonl")])
    for batch in made.train_dataloader():
        padding = batch["document_ids"] == PADDING
        assert torch.equal(batch["labels"] == -100, padding)
        assert torch.equal(batch.get("attention_mask", torch.ones_like(padding)) == 0, padding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "dense"}, "packing='dense'"),
        ({"sequence_length": 1}, "at least 2"),
        ({"val_fraction": 1.0}, "less than 1"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(InputError, match=message):
        TextData(["a.txt"], "nowhere", **changes)


def test_too_little_text_to_validate_on(folder, tmp_path):
    made = TextData(
        [str(folder / "a.txt")], str(folder / "checkpoint"), 64, 4, val_fraction=0.0001, cache_dir=str(tmp_path)
    )
    with pytest.raises(InputError, match="too few to train and validate"):
        made.tokenize()
    made.prepare_data()  # keeps the error until all ranks can hear of it
    with pytest.raises(InputError, match="too few to train and validate"):
        made.setup("fit")
