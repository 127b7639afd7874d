# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that the data was made with goes along with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.cli.main import main
from lightning_moefold.recipes import FineTuneModule, TextData
from lightning_moefold.testing import RankPool
from tests.strategy.plain_modules import trainer


def train(folder: str, tokenizer: str, checkpoint: str, output: str) -> None:
    """One step with another tokenizer than the model's; a checkpoint and a Hugging Face directory."""
    module = FineTuneModule(f"{folder}/checkpoint")
    data = TextData([f"{folder}/b.jsonl"], tokenizer, 64, 4, val_fraction=0.0, cache_dir=f"{output}.tokens")
    run = trainer(MoEFoldStrategy(fold="ep2"), max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(checkpoint)
    module.model.save_pretrained(output)


@pytest.mark.more
def test_the_tokenizer_of_the_data_is_exported(
    pool: RankPool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = AutoTokenizer.from_pretrained(folder / "checkpoint")
    other.chat_template = "{{ messages[0]['content'] }} as we say it"
    other.model_max_length = 77
    other.save_pretrained(tmp_path / "other")
    saved, exported = tmp_path / "step.ckpt", tmp_path / "exported"
    pool.run(train, str(folder), str(tmp_path / "other"), str(saved), str(tmp_path / "saved"), ranks=2)
    assert main(["export", "--checkpoint", str(saved), "--output", str(exported)]) == 0
    assert capsys.readouterr().out == f"{exported} can be loaded by transformers.\n"
    for output in (tmp_path / "saved", exported):
        tokenizer = AutoTokenizer.from_pretrained(output)
        assert tokenizer.model_max_length == 77
        chat = [{"role": "user", "content": "well"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "well as we say it"
        assert (output / "generation_config.json").exists()  # the model's

    assert (
        main(["export", "--checkpoint", str(saved), "--output", str(exported), "--model", str(folder / "checkpoint")])
        == 0
    )
    assert AutoTokenizer.from_pretrained(exported).model_max_length != 77
    (tmp_path / "other").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="trained with cannot be exported, as .*other is gone"):
        assert main(["export", "--checkpoint", str(saved), "--output", str(exported)]) == 0
    assert AutoTokenizer.from_pretrained(exported).model_max_length != 77
