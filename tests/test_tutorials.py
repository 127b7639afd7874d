# SPDX-License-Identifier: Apache-2.0
"""Every code block of the tutorials runs, in the order of the page: files are written, commands typed, Python executed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.cli.main import main
from lightning_moefold.testing import make_checkpoint
from tests.recipes.chats import chat_tokenizer
from tests.recipes.running import restored

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
#: The tutorials, and when each is tested: by what it takes.
WHEN = {
    "balance": [], "planning": [pytest.mark.more], "dpo": [pytest.mark.more], "full": [pytest.mark.slow],
    "lora": [pytest.mark.slow], "distillation": [pytest.mark.slow], "evaluation": [pytest.mark.slow],
}  # fmt: skip
#: Instead of the four ranks of a page.
ONE_RANK = {
    **dict.fromkeys(("fit", "validate"), ["--trainer.devices", "1", "--trainer.strategy.init_args.fold", ""]),
    **dict.fromkeys(("eval", "generate"), ["--devices", "1", "--fold", ""]),
}


class OneRank(L.Trainer):
    """The Trainer of a page on one rank."""

    def __init__(self, **arguments: Any) -> None:
        here = {"strategy": MoEFoldStrategy(), "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
        super().__init__(**arguments | here)


def test_there_is_a_tutorial_for_each_job() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(WHEN)


@pytest.mark.filterwarnings("ignore:::lightning.pytorch.cli")
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in WHEN.items()])
def test_tutorial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "evaluation":
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", OneRank)
    torch.manual_seed(0)
    for model in ("teacher", "student") if name == "distillation" else ("model",):
        make_checkpoint(tmp_path / model, "qwen3_moe", vocab_size=420)
        chat_tokenizer(tmp_path / model, "qwen2")
    names: dict[str, Any] = {"__name__": "tutorial"}
    blocks = BLOCK.findall((FOLDER / f"{name}.md").read_text())
    assert blocks
    for language, file, text in blocks:
        if file:
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).write_text(text)
        elif language == "bash":
            run(text)
        else:
            assert language == "python", f"a block of {language} is neither a file nor run"
            exec(compile(text, f"{name}.md", "exec", dont_inherit=True), names)


def run(text: str) -> None:
    """Types the commands of a block, which are all moefold's."""
    for line in text.replace("\\\n", " ").splitlines():
        program, command, *arguments = shlex.split(line, comments=True)
        assert program == "moefold"
        with restored():
            assert main([command, *arguments, *ONE_RANK.get(command, [])]) == 0, line
