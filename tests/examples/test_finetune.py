"""The fine-tuning script: as a user starts it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from demo_data import read_python_topics, train_tokenizer
from lightning_moefold import FoldError, MoECausalLM
from lightning_moefold.recipes import InputError, is_users
from lightning_moefold.testing import make_checkpoint

SCRIPT = Path(finetune.__file__)
ROOT = SCRIPT.parent.parent
TEXT = read_python_topics()[:30_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its tokenizer, and text in both forms."""
    folder = tmp_path_factory.mktemp("finetune")
    tokenizer = train_tokenizer(TEXT, 320)
    make_checkpoint(folder / "checkpoint", "qwen2_moe", vocab_size=320)
    tokenizer.save_pretrained(folder / "checkpoint")
    (folder / "a.txt").write_text(TEXT[:20_000])
    lines = [json.dumps({"text": paragraph}) for paragraph in TEXT[20_000:].split("\n\n")]
    (folder / "b.jsonl").write_text("\n".join(lines))
    return folder


def arguments(folder: Path, **changes: object) -> list[str]:
    options = {
        "checkpoint": folder / "checkpoint", "data": [folder / "a.txt", folder / "b.jsonl"], "output": folder / "out",
        "precision": "32-true", "accelerator": "cpu", "sequence-length": 64, "batch-size": 2, "log-every": 1, "lr": 1e-2,
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def start(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command, *words], cwd=ROOT, capture_output=True, text=True, timeout=180)


def logged(folder: Path, version: int) -> list[dict[str, str]]:
    with (folder / "out" / "logs" / f"version_{version}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.more
def test_train_export_and_resume_under_another_fold_with_torchrun(folder):
    done = start([str(SCRIPT)], *arguments(folder, fold="tp2 | ep2", devices=2, max_steps=5, val_every=2))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr

    rows = logged(folder, 0)
    for name in ("train/loss", "train/aux_loss", "val/loss", "val/perplexity", "train/mfu", "moe/load_imbalance"):
        assert any(row.get(name) for row in rows), name
    assert any(name.startswith("lr-AdamW") for name in rows[0])
    val = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert val[-1] < val[0]

    exported, source = folder / "out" / "model", folder / "checkpoint"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    token_BL = tokenizer("The statement is executed", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = theirs(token_BL).logits
        torch.testing.assert_close(MoECausalLM.from_pretrained(exported)(token_BL).logits, logits)
        assert not torch.allclose(MoECausalLM.from_pretrained(source)(token_BL).logits, logits, atol=1e-3)

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    last = folder / "out" / "checkpoints" / "last.ckpt"
    done = start(torchrun, *arguments(folder, fold="ep2", max_steps=7, val_every=2, resume=last))
    assert done.returncode == 0, done.stderr
    # The fifth step came after the last validation.
    assert [int(row["step"]) for row in logged(folder, 1) if row["train/loss"]] == [5, 6]


@pytest.mark.more
def test_an_error_of_the_user_is_one_sentence(folder):
    done = start([str(SCRIPT)], *arguments(folder, fold="tp3", devices=2))
    assert done.returncode == 1
    assert done.stderr.startswith("finetune.py: tensor_parallel_size=3")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "missing.txt"}, InputError, "missing.txt is no file"),
        ({"checkpoint": "nowhere"}, InputError, "nowhere is no directory"),
        ({"resume": "nowhere"}, InputError, "nowhere does not exist"),
        ({"batch_size": 0}, InputError, "--batch-size 0"),
        ({"val_fraction": 1}, InputError, "--val-fraction"),
        ({"val_fraction": 0.0001}, InputError, "too few to train and validate"),
        ({"sequence_length": 4096}, InputError, "the model's 128"),
        ({"fold": "ep8", "devices": 8}, FoldError, "num_experts=4 does not split"),
    ],
)
def test_wrong_input(folder, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        finetune.finetune(finetune.parse_arguments(arguments(folder, **changes)))
    assert is_users(caught.value)  # so that the script prints it alone
