# SPDX-License-Identifier: Apache-2.0
"""Mistakes end in one sentence and exit status 2; the version and the help are there without a subcommand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_moefold
from lightning_moefold.cli.fit import check_checkpoint
from lightning_moefold.cli.main import main
from lightning_moefold.cli.messages import one_sentence, unlogged
from lightning_moefold.errors import InputError, is_users, sentence
from lightning_moefold.recipes import TextData


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moefold {lightning_moefold.__version__}\n"
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    assert "plan" in capsys.readouterr().out


def test_errors_of_the_system_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as found:
        (tmp_path / "absent" / "file").write_text("")
    assert is_users(found.value)
    assert sentence(found.value) == f"No such file or directory: {tmp_path / 'absent' / 'file'}"


def test_a_metric_that_was_never_logged_is_the_users():
    with pytest.raises(RuntimeError) as found:
        EarlyStopping(monitor="val/los")._validate_condition_metric({})
    assert is_users(found.value)
    assert "\n" not in sentence(found.value)
    with pytest.raises(RuntimeError) as found:
        EarlyStopping(monitor="val/los")._validate_condition_metric({"train/loss": 1, "val/loss": 2, "lr-AdamW": 3})
    assert (
        unlogged(str(found.value)) == "EarlyStopping monitors val/los, which was never logged; did you mean val/loss?"
    )
    saver = ModelCheckpoint(monitor="accuracy")
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=SimpleNamespace(_has_run=True)))
    trainer = SimpleNamespace(callback_metrics={"train/loss": 1, "val/loss": 2, "moe/cv": 3}, fit_loop=loop)
    with pytest.raises(MisconfigurationException) as missing:
        saver._save_topk_checkpoint(trainer, dict(trainer.callback_metrics))
    assert unlogged(str(missing.value)) == (
        "ModelCheckpoint monitors accuracy, which was never logged; logged are train/loss, val/loss and others."
    )
    assert unlogged("another error") is None
    assert not is_users(RuntimeError("a bug"))


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["camera", "analyze", "--checkpoint", "m", "--data", "a.txt", "--output", "memory://a/e.npz"], "--output memory://a/e.npz"),
        (["camera", "analyze", "--checkpoint", "m", "--data", "a.txt", "--output", "e.npz", "--plot", "s3://a/e.png"], "--plot s3://a/e.png"),
        (["camera", "prune", "--checkpoint", "m", "--energies", "file:///e.npz", "--ratio", "0.2", "--output", "o"], "--energies file:///e.npz"),
        (["balance", "balanced", "--ep", "4", "--plot", "s3://b/pics"], "--plot s3://b/pics"),
        (["balance", "balanced", "--ep", "4", "--write-pool=s3://b/pool.json"], "--write-pool s3://b/pool.json"),
        (["balance", "s3://b/trace.npz", "--ep", "4"], "s3://b/trace.npz"),
        (["plot", "here", "s3://b/run"], "s3://b/run"),
    ],
)  # fmt: skip
def test_files_of_a_command_are_local(command, option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"moefold {command[0]}: {option} is an address" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_of_a_run(tmp_path):
    check_checkpoint(None)
    check_checkpoint("last")
    for name in ("step1.ckpt", "last.ckpt"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"give one of them: last\.ckpt, step1\.ckpt"):
        check_checkpoint(str(tmp_path / "runs"))
    with pytest.raises(InputError, match=r"give one of them: runs/last\.ckpt, runs/step1\.ckpt"):
        check_checkpoint(tmp_path)
    for number in range(2, 8):
        (tmp_path / "runs" / f"step{number}.ckpt").mkdir()
    with pytest.raises(InputError, match=r"step4\.ckpt and 3 more"):
        check_checkpoint(tmp_path / "runs")
    with pytest.raises(InputError, match=r"absent\.ckpt does not exist; --ckpt_path last takes"):
        check_checkpoint(str(tmp_path / "absent.ckpt"))
    check_checkpoint("memory://bucket/last.ckpt")  # a store
    (tmp_path / "runs" / "last.ckpt" / "meta.pt").write_bytes(b"")
    check_checkpoint(tmp_path / "runs" / "last.ckpt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="Hugging Face format"):
        check_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(("message", "name"), [
    ("Subcommand 'fit' does not accept option 'model.lr'", "learning_rate"),
    ("unrecognized arguments: --model.lr", "learning_rate"),
    ("unrecognized arguments: --model.bs", None),
    ("unrecognized arguments: --data.bs", "batch_size"),
])  # fmt: skip
def test_short_names_are_understood(message, name):
    said = one_sentence(message)
    assert said == message + (f"; did you mean {name}?" if name else "; --model.help lists the known ones")


def test_one_file_needs_no_list(tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("words")
    data = TextData(files=str(text), tokenizer=str(tmp_path), cache_dir=str(tmp_path / "tokens"))
    assert data._files["train"] == [Path(text)]


def test_an_unknown_key_without_a_near_name_says_what_lists_them():
    told = one_sentence("model: Option 'lrr' is not accepted")
    assert told == "model: Option 'lrr' is not accepted; --model.help lists the known ones"
    assert one_sentence("model: Option 'lr' is not accepted").endswith("did you mean learning_rate?")
    assert one_sentence("trainer: Option 'xyzw' is not accepted") == "trainer: Option 'xyzw' is not accepted"


@pytest.mark.parametrize(
    "words",
    [["merge", "--adapter", "adapter"], ["camera", "prune", "--energies", "e.npz", "--ratio", "0.5"], ["upcycle"]],
    ids=lambda words: words[0],
)
def test_the_model_that_is_read_is_not_replaced(words, tmp_path, capsys):
    """Also under another spelling of its path; nothing is read before."""
    model = tmp_path / "model"
    model.mkdir()
    assert main([*words, "--checkpoint", str(model), "--output", f"{tmp_path}/./model/"]) == 2
    assert "is the model of --checkpoint, which it would replace; give another directory." in capsys.readouterr().err
    assert list(model.iterdir()) == []


def test_no_plans_to_show(capsys):
    assert main(["plan", "--model", "mixtral-8x7b", "--gpus", "8", "--global-batch-size", "8", "--top", "0"]) == 2
    assert "--top 0 must be at least 1." in capsys.readouterr().err
