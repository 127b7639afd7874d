# SPDX-License-Identifier: Apache-2.0
"""Kept tokens: checked when they are read, and not left behind half written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_moefold.errors import InputError
from lightning_moefold.recipes import TextData, cache, store
from tests.recipes.chats import chat_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", None)
    words = np.random.default_rng(0).choice(["one", "more", "think", "what"], 6000)
    (tmp_path / "a.txt").write_text(" ".join(words))
    return TextData(
        tokenizer=str(tokenizer), files=[str(tmp_path / "a.txt")], cache_dir=str(tmp_path / "cache"), sequence_length=16
    )


def _folder(tmp_path: Path) -> Path:
    [folder] = [path for path in (tmp_path / "cache").iterdir() if (path / "tokens.bin").exists()]
    return folder


def test_a_flipped_bit_is_found_where_it_is_read(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BLOCK", 4096)
    data.tokenize()
    whole, _, _ = data._rows("train")
    expected = whole.take(range(len(whole))).token_BL
    file = _folder(tmp_path) / "tokens.bin"
    content = bytearray(file.read_bytes())
    assert len(content) > 3 * 4096
    content[-5] ^= 1
    file.write_bytes(content)
    rows, _, _ = data._rows("train")
    assert np.array_equal(rows.take(range(8)).token_BL, expected[:8])
    with pytest.raises(InputError, match=r"tokens.bin is damaged.*delete .*, and the text is tokenised again"):
        rows.take(range(len(rows)))
    for name in ("ends.bin", "origins.bin", "counts.json", "checksums.json"):
        file = _folder(tmp_path) / name
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(InputError, match="delete it, and the text is tokenised again"):
            data._rows("train")
        file.write_bytes(kept)


def test_a_full_disk(data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_sums", fail)
        with pytest.raises(InputError, match="cannot keep what is tokenised: no space is left on the disk"):
            data.tokenize()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != "digests"] == []
    data.tokenize()
    assert len(data._rows("train")[0]) > 8
