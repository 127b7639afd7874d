# SPDX-License-Identifier: Apache-2.0
"""From files to rows."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_moefold.cli.data import statistics
from lightning_moefold.recipes import InputError, TextData
from lightning_moefold.recipes.documents import name_of, read_rows
from lightning_moefold.recipes.packing import PADDING
from lightning_moefold.recipes.template import Document
from tests.recipes.rows import rows_of, tokenized, tokens


def documents(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(3)
    return [[1000 * n + i for i in range(draw.randint(1, longest))] for n in range(count)]


def test_blocks_are_the_text_in_order():
    text = documents(20, 30)
    rows = rows_of([Document(document) for document in text], "blocks", 16)
    flat = [token for document in text for token in document]
    token_NL, document_NL, _ = rows.take(range(len(rows)))
    assert token_NL.flatten().tolist() == flat[: len(flat) // 16 * 16]
    assert torch.equal(document_NL.long(), token_NL // 1000)


def test_packed_documents_are_whole():
    text = documents(40, 50)
    rows = rows_of([Document(document) for document in text], "documents", 16)
    token_NL, document_NL, _ = rows.take(range(len(rows)))
    found: dict[int, list[int]] = {}
    pieces = 0
    for token_L, document_L in zip(token_NL.tolist(), document_NL.tolist(), strict=True):
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
    assert (document_NL != PADDING).float().mean() > 0.95


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"a few words", "fewer than one row"),
        ("latin.txt", "na\xefve".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"words": "two"}', "line 2 is not a JSON object with .*; its keys are 'words'"),
        ("b.jsonl", b'{"text": 3}', "line 1 is not"),
        ("c.jsonl", b'[{"text": "one"}]', "line 1 is not"),
        ("d.JSONL", b"plain words", "line 1 is not"),
        ("e.json", b'[{"text": "one"}, {"text": null}]', "entry 2 is not"),
        ("f.json", b'{"text": ["one", "two"]}', "entry 1 is not"),
        ("g.json", b'{"text": "one"', "line 1 is not"),
        (
            "g2.json",
            b'[\n  {\n    "text": "one"\n  },\n  {\n    "text": two\n  }\n]',
            r"g2.json, line 6 is not JSON \(expecting value\)",
        ),
        ("g3.json", b'{"text": "one"}\n{"text"}\n', "line 2 is not a JSON object"),
        (
            "g4.json",
            b'[\n{"text": "one", "text": "two"}]',
            "has the key 'text' twice in one object; leave one of them out",
        ),
        ("g5.json", b"[" * 100_000, "g5.json is nested too deep"),
        ("p.jsonl", b'{"text": "one"}\n' + b"[" * 100_000, "line 2 is nested too deep"),
        (
            "q.jsonl",
            b'{"text": "one", "of": {"a": 1, "b": 2, "a": 3}}',
            "line 1 has the key 'a' twice; leave one of them out",
        ),
        ("r.jsonl", b'{"text": ""}\n', "nothing of the 1 rows of .* texts must not be empty"),
        ("h.jsonl", b'{"text": "half \\ud800"}', "h.jsonl:1 holds characters that are no Unicode text"),
        ("i.jsonl.gz", b'{"text": "not packed"}', "cannot be read"),
        ("j.txt.gz", gzip.compress(b"cut short", mtime=0)[:-9], "cannot be read"),
        ("k.csv", b"text\nabc\n", "k.csv is not read, as text is taken from .txt, .jsonl, .json or .parquet files"),
        ("l.parquet", b"PAR1", "l.parquet cannot be read as parquet"),
        ("m.jsonl.zst", b"...", "m.jsonl.zst is not read"),
        ("n.gz", b"...", "n.gz is not read"),
        ("o", b"words", "o is not read"),
    ],
)
def test_wrong_text(folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokenized([tmp_path / name], folder / "checkpoint", 64, "blocks")


LINES = '{"text": "one line"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.ndjson", LINES.replace("\n", "\r\n").encode()),
        ("a.json", LINES.encode()),
        ("a.json", b'[\n {"text": "one line"},\n {"text": "two", "source": 7}\n]'),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.encode().replace(b"\n{", b"\n\xef\xbb\xbf{")),  # a joined file
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
    ],
)
def test_documents_of_every_ending(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = [(name_of(tmp_path / name, raw.number), raw.read()["text"]) for raw in read_rows([tmp_path / name])]
    assert found == [(f"{name}:1", "one line"), (f"{name}:2", "two")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n{}\n".encode("utf-8-sig")),
        ("a.TXT", b"one\r\n{}\r\n"),
        ("a.md", b"one\n{}\n"),
        ("a.txt.gz", gzip.compress(b"one\n{}\n", mtime=0)),
    ],
)
def test_whole_files_are_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [(raw.number, raw.read()) for raw in read_rows([tmp_path / name])] == [(0, "one\n{}\n")]


def test_wrong_tokenizer(folder, tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenized([folder / "a.txt"], tmp_path, 64, "blocks")
    (tmp_path / "config.json").write_text((folder / "checkpoint" / "config.json").read_text())
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenized([folder / "a.txt"], tmp_path, 64, "blocks")
    AutoTokenizer.from_pretrained(folder / "checkpoint").save_pretrained(tmp_path)
    config = (folder / "checkpoint" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 320', '"vocab_size": 300'))
    with pytest.raises(InputError, match="only 300 tokens"):
        tokenized([folder / "a.txt"], tmp_path, 64, "blocks")


def test_a_tokenizer_beside_a_model_of_another_kind(folder, tmp_path):
    AutoTokenizer.from_pretrained(folder / "checkpoint").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 320}')
    rows = tokenized([folder / "a.txt"], tmp_path, 64, "blocks")
    assert torch.equal(tokens(rows), tokens(tokenized([folder / "a.txt"], folder / "checkpoint", 64, "blocks")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer.model": "x", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
            "tokenizer.model is read by sentencepiece, which is not installed; pip install sentencepiece",
        ),
        (
            {"a.tiktoken": "x", "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
            "a.tiktoken is read by tiktoken, which is not installed; pip install tiktoken",
        ),
        ({"tekken.json": "{}"}, "tekken.json is read by mistral-common, which is not installed"),
        ({"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'}, "has no vocabulary"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "has no vocabulary"),
        ({"tokenizer.json": "{"}, "no tokenizer that transformers can load .JSONDecodeError"),
    ],
)
def test_what_is_missing_of_a_tokenizer(folder, tmp_path, monkeypatch, files, message):
    find = importlib.util.find_spec
    absent = ("sentencepiece", "tiktoken", "mistral_common")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        tokenized([folder / "a.txt"], tmp_path, 64, "blocks")
    assert "\n" not in str(caught.value)


CODE = """
import pathlib
from transformers import PreTrainedTokenizer

class Letters(PreTrainedTokenizer):
    vocab_size = 300
    def __init__(self, **options):
        pathlib.Path(__file__).touch()
        super().__init__(eos_token="<eos>", **options)
    def get_vocab(self):
        return {chr(i): i for i in range(300)}
    def _tokenize(self, text):
        return list(text)
    def _convert_token_to_id(self, token):
        return ord(token) if len(token) == 1 else 0
    def _convert_id_to_token(self, number):
        return chr(number)
"""


@pytest.mark.parametrize("spelling", [{"AutoTokenizer": ["tokenization_letters.Letters", None]}, None])
def test_code_of_a_tokenizer_is_refused_or_allowed_and_never_asked_about(folder, tmp_path, monkeypatch, spelling):
    def asked(_: str = "") -> str:
        raise AssertionError("nobody sits at the terminal of a job")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenization_letters.py").write_text(CODE)
    config = {"tokenizer_class": "Letters", "auto_map": spelling or ["tokenization_letters.Letters", None]}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    (own / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}')
    (tmp_path / "a.txt").write_text("abcd" * 20)
    with pytest.raises(InputError, match=r"code of its own .tokenization_letters.Letters.* trust_remote_code=True"):
        tokenized([tmp_path / "a.txt"], own, 4, "blocks")
    (own / "config.json").unlink()
    rows = tokenized([tmp_path / "a.txt"], own, 4, "blocks", trust_remote_code=True)
    assert tokens(rows)[0].tolist() == [ord(letter) for letter in "abcd"]


def letters(path: Path, template: str) -> Path:
    """A tokenizer of single letters that adds what ``template`` says."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("template", "add", "expected"),
    [
        ("$A", True, [[3, 4, 2], [5, 2], [1, 3, 2]]),
        ("<s> $A", True, [[1, 3, 4, 2], [1, 5, 2], [1, 3, 2]]),
        ("<s> $A </s>", True, [[1, 3, 4, 2], [1, 5, 2], [1, 3, 2]]),
        ("<s> $A </s>", False, [[3, 4, 2], [5, 2], [1, 3, 2]]),
    ],
)
def test_documents_begin_as_the_tokenizer_begins_them(tmp_path, template, add, expected):
    """The last text spells its begin and its end itself; neither is doubled."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "c", "<s>a</s>")))
    settings = {"packing": "documents", "add_special_tokens": add, "val_fraction": 0.0, "cache_dir": str(tmp_path)}
    made = TextData([str(file)], str(letters(tmp_path / "tokenizer", template)), 8, 1, **settings)
    made.prepare_data()
    made.setup("fit")
    token_BL, document_BL, _ = made.part("train").take(torch.arange(len(made.part("train"))))
    assert [token_BL[document_BL == number].tolist() for number in range(3)] == expected


def test_documents_end_with_the_end_of_text(folder, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\u2028line"}\n\n{"text": "two"}\n', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    rows = tokenized([file], folder / "checkpoint", 2, "blocks")
    text = tokenizer.decode(tokens(rows).flatten().tolist())
    assert "one\u2028line<|endoftext|>two<|endoftext|>".startswith(text)
    assert "<|endoftext|>tw" in text
    assert [rows.store.name(0), rows.store.name(1)] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_empty_texts_are_left_out_and_told(folder, tmp_path, packing):
    lines = ["", "one", "", "two", " "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="train: of 5 rows, 2 left out, as their text is empty"):
        made = data(
            folder, tmp_path / "cache", [str(tmp_path / "a.jsonl")], packing=packing, sequence_length=2, val_fraction=0
        )
    store = made.part("train").rows.store
    assert [store.name(n) for n in range(len(store))] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:5"]
    assert "left out     2 rows with an empty text" in statistics(made.part("train"))
    assert (store.counts.rows, store.counts.chats, store.counts.empty, store.counts.unlabelled) == (5, 0, 2, 0)


def data(folder: Path, cache: Path, files: list[str], **changes: object) -> TextData:
    made = TextData(
        [str(folder / f) for f in files],
        str(folder / "checkpoint"),
        **{"sequence_length": 64, "batch_size": 4} | changes,
        cache_dir=str(cache),
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
    data(folder, tmp_path, ["a.txt"], packing="documents")  # packed anew, from the same tokens
    assert len(list(tmp_path.iterdir())) == 2
    data(folder, tmp_path, ["a.txt"], add_special_tokens=False)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "a.tiktoken", "tekken.json", "tokenization_own.py"])
def test_text_is_tokenised_again_for_another_tokenizer(folder, tmp_path, name):
    AutoTokenizer.from_pretrained(folder / "checkpoint").save_pretrained(tmp_path / "own")
    made = TextData([str(folder / "a.txt")], str(tmp_path / "own"), 64, 4, cache_dir=str(tmp_path))
    before = made.cache.path([folder / "a.txt"])
    with (tmp_path / "own" / name).open("a") as file:
        file.write(" ")
    assert made.cache.path([folder / "a.txt"]) != before


def test_packed_batches(folder, tmp_path):
    made = data(folder, tmp_path, ["b.jsonl"], packing="documents", val_files=[str(folder / "c.jsonl")])
    batches = list(made.train_dataloader())
    assert any((batch["document_ids"] == PADDING).any() for batch in batches)
    for batch in batches:
        padding = batch["document_ids"] == PADDING
        assert torch.equal(batch["labels"] == -100, padding)
        assert torch.equal(batch.get("attention_mask", torch.ones_like(padding)) == 0, padding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "dense"}, "packing='dense'"),
        ({"sequence_length": 1}, "at least 2"),
        ({"val_fraction": 1.0}, "less than 1"),
        ({"files": []}, "at least one file"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(InputError, match=message):
        TextData(**{"files": ["a.txt"], "tokenizer": "nowhere"} | changes)


def test_too_little_text_to_validate_on(folder, tmp_path):
    made = TextData(
        [str(folder / "a.txt")], str(folder / "checkpoint"), 64, 4, val_fraction=0.0001, cache_dir=str(tmp_path)
    )
    with pytest.raises(InputError, match="too few to train and validate"):
        made.tokenize()
    made.prepare_data()  # keeps the error until all ranks can hear of it
    with pytest.raises(InputError, match="too few to train and validate"):
        made.setup("fit")
