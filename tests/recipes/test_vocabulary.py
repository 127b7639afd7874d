# SPDX-License-Identifier: Apache-2.0
"""A tokenizer with more tokens than the model: the message says how to go on, and that way works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moefold import MoECausalLM
from lightning_moefold.recipes import InputError
from lightning_moefold.testing import hf_reference, make_checkpoint
from tests.recipes.rows import tokenized, tokens


def test_a_model_is_enlarged(folder: Path, tmp_path: Path) -> None:
    text = folder / "a.txt"
    small, large = make_checkpoint(tmp_path / "small", "qwen2_moe", vocab_size=300), tmp_path / "large"
    AutoTokenizer.from_pretrained(folder / "checkpoint").save_pretrained(small)
    with pytest.raises(
        InputError, match=r"gives token 3\d\d, but the model has only 300 .*resize_token_embeddings"
    ) as told:
        tokenized([text], small, 64, "blocks")
    count = int(str(told.value).split("resize_token_embeddings(")[1].split(")")[0])
    model = AutoModelForCausalLM.from_pretrained(small)
    model.resize_token_embeddings(count)
    model.save_pretrained(large)
    AutoTokenizer.from_pretrained(small).save_pretrained(large)
    assert json.loads((large / "config.json").read_text())["vocab_size"] == count
    rows = tokens(tokenized([text], large, 64, "blocks"))[:2]
    with torch.no_grad():
        expected = hf_reference(large)(input_ids=rows, use_cache=False).logits
        torch.testing.assert_close(MoECausalLM.from_pretrained(large, torch.float64)(rows).logits, expected)
