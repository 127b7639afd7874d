# SPDX-License-Identifier: Apache-2.0
"""What cannot work is one sentence on every rank, at once: no peer hangs and nothing is left half-written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lightning_moefold.testing import RankPool, make_checkpoint
from tests.quick import quick
from tests.strategy import jobs_bad_input


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model") / "qwen", "qwen3_moe", num_experts=4))


def sentence(message: str) -> None:
    """``Kind: what, why, and what to do.``"""
    assert message != "no error"
    assert "\n" not in message.strip(), message
    assert len(message) < 500, message


@pytest.mark.parametrize("fold", quick(["", "tp2 | ep4", "tp2 | ep2 etp2"], "tp2 | ep2 etp2"))
def test_one_rank_has_a_bad_batch(pool: RankPool, path: str, fold: str) -> None:
    outcomes = pool.run(jobs_bad_input.batches, path, fold, ranks=4)
    patterns = {
        "token": "1 token ids .* outside the vocabulary of 96",
        "negative token": "1 token ids .* outside the vocabulary of 96",
        "label": "1 labels .* outside the vocabulary of 96",
        "no rows": "holds no token",
        "shape of labels": "make them equal",
        "shape of mask": "make them equal",
        "floats": "must be integers",
        "mask of floats": "has the dtype torch.float32",
        "negative mask": "holds -1",
        "one dimension": "must be integers",
    }
    for messages in outcomes:
        for name, pattern in patterns.items():
            sentence(messages[name])
            assert messages[name].startswith("BatchError"), messages[name]
            assert re.search(pattern, messages[name]), f"{name}: {messages[name]}"
        assert messages["good again"] == "no error"


def test_places_that_cannot_be_written(pool: RankPool, path: str, tmp_path: Path) -> None:
    for messages in pool.run(jobs_bad_input.saves, path, str(tmp_path), ranks=2):
        assert "holds 'thesis.tex', which is no part of a checkpoint" in messages["foreign"]
        for message in messages.values():
            sentence(message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "foreign"]
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


FOLDS = {
    "tp3": "does not divide", "ep8": "does not divide", "dp4": "leave dp out",
    "tq2": "write it like", "etp16": "use",
}  # fmt: skip


def test_folds_that_are_illegal(pool: RankPool, path: str) -> None:
    for messages in pool.run(jobs_bad_input.starts, path, list(FOLDS), ranks=2):
        for fold, pattern in FOLDS.items():
            sentence(messages[fold])
            assert pattern in messages[fold], messages[fold]


def test_folds_that_do_not_suit_the_model(pool: RankPool, tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path / "odd", "qwen3_moe", num_experts=3, moe_intermediate_size=15)
    for messages in pool.run(jobs_bad_input.starts, str(odd), ["ep2", "etp2"], ranks=2):
        assert "num_experts=3 does not split evenly over ep=2; use ep in 1,3." in messages["ep2"]
        assert (
            "moe_intermediate_size=15 does not divide by etp=2; use etp in 1,3,5, or a width of 16." in messages["etp2"]
        )


def test_features_that_cannot_work(pool: RankPool, path: str, tmp_path: Path) -> None:
    for messages in pool.run(jobs_bad_input.features, path, str(tmp_path), ranks=2):
        for name, message in messages.items():
            sentence(message)
            assert name in message, message
    assert not list(tmp_path.iterdir())


def _damage(path: str, folder: Path) -> dict[str, tuple[Path, str]]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(path, folder / name))

    def configure(name: str, **fields: object) -> Path:
        target = copy(name)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | fields))
        return target

    truncated = copy("truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    missing_index = copy("index to nowhere")
    (missing_index / "model.safetensors").unlink()
    escaping = copy("escaping")
    (escaping / "model.safetensors").rename(folder / "outside.safetensors")
    for target, file in ((missing_index, "model-1.safetensors"), (escaping, "../outside.safetensors")):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    garbage = copy("garbage index")
    (garbage / "model.safetensors.index.json").write_text("[1, 2")
    bare = copy("bare")
    (bare / "model.safetensors").unlink()
    no_json = copy("no json")
    (no_json / "config.json").write_text("{")
    (folder / "file").write_text("")
    return {
        "truncated": (truncated, "damaged or truncated"),
        "missing file": (missing_index, "model-1.safetensors is missing"),
        "escaping": (escaping, "not a safetensors file inside"),
        "garbage index": (garbage, "not a safetensors index"),
        "bare": (bare, "only safetensors is read"),
        "no json": (no_json, "not valid JSON"),
        "not there": (folder / "nothing", "give a directory in Hugging Face format"),
        "a file": (folder / "file", "give a directory in Hugging Face format"),
        "missing tensor": (configure("missing", num_hidden_layers=4), "has no tensor 'model.layers.3"),
        "extra tensor": (configure("extra", num_hidden_layers=2), "holds 'model.layers.2"),
        "misshapen tensor": (configure("misshapen", vocab_size=100), "but the configuration makes it [100, 32]"),
        "architecture": (configure("llama", model_type="llama"), "mixtral, qwen2_moe, qwen3_moe"),
        "dropout": (configure("dropout", attention_dropout=0.1), "attention_dropout=0.1 is not supported"),
        "rope": (
            configure("yarn", rope_parameters={"rope_type": "yarn", "factor": 4.0}),
            "rope_type='yarn' is not supported",
        ),
    }


def test_directories_that_are_no_checkpoints(pool: RankPool, path: str, tmp_path: Path) -> None:
    cases = _damage(path, tmp_path)
    for messages in pool.run(jobs_bad_input.loads, [str(p) for p, _ in cases.values()], "| ep2", ranks=2):
        for (name, (_, pattern)), message in zip(cases.items(), messages, strict=True):
            sentence(message)
            assert pattern in message, f"{name}: {message}"


def test_one_rank_cannot_read(pool: RankPool, path: str) -> None:
    own, peer = sorted(pool.run(jobs_bad_input.damaged_on_one_rank, path, ranks=2), key=lambda m: "rank 1 failed" in m)
    assert own == "OSError: the disk is gone"
    assert peer == "PeerError: rank 1 failed: OSError: the disk is gone"


@pytest.mark.more
def test_one_traceback_is_printed(pool: RankPool, path: str) -> None:
    """By the rank that failed, or by rank 0 where all refuse the same; the others print one line each."""
    [first, second] = pool.run(jobs_bad_input.printed, path, ranks=2)
    assert first["one rank fails"] == "[rank 0] PeerError: rank 1 failed: OSError: the disk is gone\n"
    assert "Traceback" in second["one rank fails"]
    assert second["one rank fails"].endswith("OSError: the disk is gone\n")
    assert "Traceback" in first["all refuse"]
    assert second["all refuse"].startswith("[rank 1] UnsupportedFeature: LBFGS")
    assert second["all refuse"].count("\n") == 1
    for other in (first, second):
        assert "Traceback" in other["user's error"]
        assert other["user's error"].endswith("KeyError: 'input_ids'\n")


def test_checkpoints_that_do_not_fit(pool: RankPool, path: str, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "qwen3_moe", num_experts=4, num_hidden_layers=2)
    patterns = {
        "other model": "which the module does not have",
        "other optimizer": "configure it alike",
        "truncated": "is cut off",
        "single file": "is a single file, not a checkpoint of this strategy",
        "empty": "has no meta.pt",
        "absent": "absent.ckpt",
    }
    for messages in pool.run(jobs_bad_input.foreign_checkpoint, path, str(other), str(tmp_path), ranks=2):
        for name, pattern in patterns.items():
            assert messages[name] != "no error", name
            assert pattern in messages[name], f"{name}: {messages[name]}"
