# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with its tokenizer, and text, shared by the tests of this folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo_data import read_python_topics, train_tokenizer
from lightning_moefold.testing import make_checkpoint
from tests.recipes.running import ROOT, arguments

TEXT = read_python_topics()[:30_000]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``checkpoint/`` (320 tokens), ``a.txt``, ``b.jsonl`` and ``c.jsonl``."""
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = train_tokenizer(TEXT, 320)
    make_checkpoint(folder / "checkpoint", "qwen2_moe", vocab_size=320)
    tokenizer.save_pretrained(folder / "checkpoint")
    paragraphs = [json.dumps({"text": paragraph}) for paragraph in TEXT.split("\n\n")]
    (folder / "a.txt").write_text(TEXT[:9_000])
    (folder / "b.jsonl").write_text("\n".join(paragraphs[20:33]))
    (folder / "c.jsonl").write_text("\n".join(paragraphs[70:84]) + "\n\n")
    return folder


@pytest.fixture(scope="session")
def fitted(folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of examples/finetune.yaml on two ranks that one command has started, and what it printed."""
    output = folder / "fitted"
    words = [sys.executable, "-m", "lightning_moefold", "fit", *arguments(folder, output)]
    return output, subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
