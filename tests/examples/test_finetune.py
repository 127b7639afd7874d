"""The fine-tuning script: as a user starts it, and its parts."""

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


def test_train_export_and_resume_under_another_fold_with_torchrun(folder):
    done = start([str(SCRIPT)], *arguments(folder, fold="tp2 | ep2", devices=2, max_steps=4, val_every=2))
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
    done = start(torchrun, *arguments(folder, fold="ep2", max_steps=6, val_every=2, resume=last))
    assert done.returncode == 0, done.stderr
    assert [int(row["step"]) for row in logged(folder, 1) if row["train/loss"]] == [4, 5]


def test_an_error_of_the_user_is_one_sentence(folder):
    done = start([str(SCRIPT)], *arguments(folder, fold="tp3", devices=2))
    assert done.returncode == 1
    assert done.stderr.startswith("finetune.py: tensor_parallel_size=3")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "missing.txt"}, finetune.InputError, "missing.txt is no file"),
        ({"checkpoint": "nowhere"}, finetune.InputError, "nowhere is no directory"),
        ({"resume": "nowhere"}, finetune.InputError, "nowhere does not exist"),
        ({"batch_size": 0}, finetune.InputError, "--batch-size 0"),
        ({"val_fraction": 1}, finetune.InputError, "--val-fraction"),
        ({"val_fraction": 0.0001}, finetune.InputError, "too few to train and validate"),
        ({"sequence_length": 4096}, finetune.InputError, "the model's 128"),
        ({"fold": "ep8", "devices": 8}, FoldError, "num_experts=4 does not split"),
    ],
)
def test_wrong_input(folder, changes, error, message):
    with pytest.raises(error, match=message):
        finetune.finetune(finetune.parse_arguments(arguments(folder, **changes)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"a few words", "fewer than one block"),
        ("latin.txt", "na\xefve".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"words": "two"}', "line 2 is not"),
        ("b.jsonl", b'{"text": 3}', "line 1 is not"),
    ],
)
def test_wrong_data(folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(finetune.InputError, match=message):
        finetune.tokenize([tmp_path / name], folder / "checkpoint", 64)


def test_documents_end_with_the_end_of_text(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    tokens = finetune.tokenize([tmp_path / "a.jsonl"], folder / "checkpoint", 2).flatten().tolist()
    text = tokenizer.decode(tokens)
    assert "one<|endoftext|>two".startswith(text)
    assert "<|endoftext|>" in text


def test_every_tenth_block_is_for_validation(folder, tmp_path):
    data = finetune.TextBlocks([folder / "a.txt"], folder / "checkpoint", 64, 2, 0.1, tmp_path)
    data.prepare_data()
    data.setup("fit")
    count = len(data.train) + len(data.val)
    assert len(data.val) == count // 10
    assert sorted([*data.train.indices, *data.val.indices]) == list(range(count))


def test_weight_decay_is_for_matrices(folder):
    model = MoECausalLM.from_pretrained(folder / "checkpoint")
    groups = finetune.parameter_groups(model, 0.5)
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.5 for p in group["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if "norm" not in name and "bias" not in name}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_learning_rate_rises_and_falls():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = finetune.warmup_cosine(optimizer, warmup=4, total=20)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(0.1)
