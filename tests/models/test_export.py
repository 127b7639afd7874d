# SPDX-License-Identifier: Apache-2.0
"""What a run writes is used by transformers like the model it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.models.export import export
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.models import jobs_export
from tests.quick import quick


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe", "qwen3_moe"], "qwen2_moe"))
def test_exports_generate_padded_prompts(pool: RankPool, tmp_path: Path, family: str) -> None:
    """With the loss that needs output_router_logits, under which generation of padded prompts fails in transformers."""
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(tmp_path / "source", family, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    pool.run(jobs_export.train_and_save, str(path), "| ep2", str(tmp_path), ranks=2)
    export(tmp_path / "run.ckpt", tmp_path / "exported")
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    texts = []
    for place in ("saved", "exported"):
        written = json.loads((tmp_path / place / "config.json").read_text())
        source = json.loads((path / "config.json").read_text())
        assert written == source, "a run changes nothing that configures the function"
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        texts.append(theirs.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
        ours = MoECausalLM.from_pretrained(tmp_path / place).generate(ids, mask, max_new_tokens=6)
        assert torch.equal(ours, texts[-1])
    assert torch.equal(*texts)
