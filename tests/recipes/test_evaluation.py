# SPDX-License-Identifier: Apache-2.0
"""``moefold eval`` finds what lm-eval's own ``hf`` finds on the same checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.cli.main import main
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.recipes import evaluated
from tests.recipes.chats import chat_tokenizer
from tests.recipes.running import ROOT

lm_eval = pytest.importorskip("lm_eval")
TASKS = "next_choice,next_text,next_said"


def flat(x: Any) -> list[Any]:
    return [leaf for part in x for leaf in flat(part)] if isinstance(x, (list, tuple)) else [x]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    chat_tokenizer(folder / "checkpoint", "qwen2")
    made = make_checkpoint(folder / "model", "qwen2_moe", vocab_size=420)
    for file in made.iterdir():
        file.rename(folder / "checkpoint" / file.name)
    evaluated.make_tasks(folder / "tasks")
    return folder


def by_hugging_face(folder: Path) -> dict[str, list[Any]]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder / "checkpoint"), device="cpu", dtype="float32", batch_size=2)
    manager = TaskManager(include_path=str(folder / "tasks"))
    results = lm_eval.simple_evaluate(model, tasks=TASKS.split(","), task_manager=manager, bootstrap_iters=10)
    return evaluated.found(results), results["results"]


def test_texts_end_where_those_of_hugging_face_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lightning_moefold.recipes.evaluation import FoldLM

    path = folder / "ends"
    shutil.copytree(folder / "checkpoint", path)

    def said(until: list[str]) -> tuple[list[str], list[str]]:
        asked = {"until": until, "max_gen_toks": 8}
        requests = [Instance("generate_until", {}, (text, asked), 0) for text in ("one, then two", "three")]
        ours = FoldLM(MoECausalLM.from_pretrained(path, torch.float32), load_tokenizer(path), 1, "ours")
        theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1)
        return ours.generate_until(requests), theirs.generate_until(requests)

    free, wanted = said(["\n\n"])
    assert free == wanted
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer("one, then two")["input_ids"]])
    tokens = MoECausalLM.from_pretrained(path, torch.float32).generate(ids, max_new_tokens=8, eos_token_id=())
    end = int(tokens[0, -4])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, end]}))
    ended, wanted = said(["\n\n"])
    assert ended == wanted
    assert ended != free


@pytest.mark.more  # lm-eval and datasets on every rank
def test_tasks_under_folds_are_those_of_hugging_face(pool: RankPool, folder: Path):
    wanted, metrics = by_hugging_face(folder)
    for ranks, fold, tasks in ((2, "| ep2", TASKS), (4, "tp2 pp2 | ep2", "next_choice,next_text")):
        for answers, found in pool.run(evaluated.run, str(folder), fold, tasks, ranks=ranks):
            for name in tasks.split(","):
                assert (
                    flat(answers[name]) == pytest.approx(flat(wanted[name]), rel=1e-4, abs=1e-4)
                    if name != "next_said"
                    else True
                )
                for key, value in found[name].items():
                    if isinstance(value, float):
                        assert value == pytest.approx(metrics[name][key], rel=1e-4)
            if "next_said" in tasks:
                assert flat(answers["next_said"]) == flat(wanted["next_said"])


@pytest.mark.slow  # as above, and two processes from scratch
def test_the_command_on_two_ranks(folder: Path, tmp_path: Path):
    _, metrics = by_hugging_face(folder)
    output = tmp_path / "results.json"
    words = [
        sys.executable, "-m", "lightning_moefold", "eval", "--checkpoint", str(folder / "checkpoint"), "--tasks", TASKS,
        "--include-path", str(folder / "tasks"), "--devices", "2", "--fold", "| ep2", "--accelerator", "cpu", "--precision",
        "32-true", "--batch-size", "2", "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|next_choice|") == 1, "one rank prints the table"
    results = json.loads(output.read_text())
    assert set(results) == set(TASKS.split(","))
    for name, wanted in metrics.items():
        for key, value in wanted.items():
            if isinstance(value, float) and "stderr" not in key:
                assert results[name][key] == pytest.approx(value, rel=1e-4), (name, key)


def test_wrong_arguments(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    words = ["eval", "--checkpoint", str(folder / "checkpoint"), "--tasks", "next_choice"]
    assert main([*words, "--batch-size", "0"]) == 2
    assert "--batch-size 0 must be at least 1" in capsys.readouterr().err
    for limit in ("0", "-1", "10.5", "nan", "inf"):
        assert main([*words, f"--limit={limit}"]) == 2
        assert f"--limit {limit} must be a whole number of examples" in capsys.readouterr().err
    assert main([*words, "--output", str(folder)]) == 2
    assert "it is a directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(words) == 2
    assert "lm-eval, which is not installed; pip install 'lightning-moefold[eval]'" in capsys.readouterr().err
