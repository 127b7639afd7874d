# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in stores behind a scheme are what they are in a folder: complete or invisible, and the same run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.checkpoint.stores import check_folder, local_path, parse_path
from lightning_moefold.testing import RankPool, assert_close_by_name
from lightning_moefold.testing.pieces import assemble
from tests.checkpoint import jobs_stores as jobs
from tests.quick import quick


def test_paths() -> None:
    assert parse_path("runs/a.ckpt") == Path("runs/a.ckpt")
    assert parse_path("file:///runs/a.ckpt") == parse_path("local:///runs/a.ckpt") == Path("/runs/a.ckpt")
    assert parse_path("file:/runs/a.ckpt") == Path("/runs/a.ckpt")  # so fsspec reads it, and Lightning writes it
    assert parse_path("memory://runs/a.ckpt") == "memory://runs/a.ckpt"
    assert parse_path("step=1:2/a:b.ckpt") == Path("step=1:2/a:b.ckpt")
    for lost in (Path("s3://bucket/a.ckpt"), "/work/file:/runs/a.ckpt", "gs:/bucket"):
        with pytest.raises(CheckpointError, match="has a folder named"):
            parse_path(lost)
    with pytest.raises(CheckpointError, match="Protocol not known"):
        parse_path("nowhere://a")
    with pytest.raises(CheckpointError, match="cache_dir 'memory://a' is in a store"):
        local_path("memory://a", "cache_dir")


def test_models_are_read_from_the_address_they_were_written_to(path: str, tmp_path: Path) -> None:
    model = MoECausalLM.from_pretrained(f"file://{path}")
    model.save_pretrained(f"file://{tmp_path}/copy")
    assert MoECausalLM.from_pretrained(f"file://{tmp_path}/copy").config == model.config
    with pytest.raises(CheckpointError, match="the model's directory 'memory://a/b' is in a store"):
        local_directory("memory://a/b")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    check_folder(tmp_path / "new" / "runs")
    for part, reason in (("file", "is a file"), ("gone", "is a link to nothing")):
        with pytest.raises(CheckpointError, match=f"because {tmp_path}/{part} {reason}"):
            check_folder(tmp_path / part / "runs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "gone"]


@pytest.mark.parametrize(
    ("scheme", "ranks", "folds"),
    [
        pytest.param("memory", 1, ["", ""], marks=pytest.mark.more),
        ("bucket", 2, ["tp2 | ep2", "| ep2"]),
        pytest.param("local", 2, ["| ep2", "tp2 | ep2"], marks=pytest.mark.slow),
    ],
)
def test_save_and_resume(
    pool: RankPool,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    ranks: int,
    folds: list[str],
) -> None:
    directory = f"{scheme}://{tmp_path}/run"
    outcome = pool.run(jobs.save_and_resume, path, folds, directory, ranks=ranks)
    full, resumed = [f for f, _, _ in outcome], [r for _, r, _ in outcome]
    for report in resumed:
        assert report.losses == pytest.approx(full[0].losses[3:], rel=1e-9)
        assert report.counters == full[0].counters
    for part in ("weights", "state"):
        a, b = (assemble(getattr(report, part) for report in reports) for reports in (resumed, full))
        assert_close_by_name(a, b, 1e-9, part)
    files = outcome[0][2]
    assert {name.partition("/")[0] for name in files} == {f"step={i}.ckpt" for i in range(1, 11)}
    assert len(files) == 10 * (
        3 + ranks
    )  # meta.pt, the list of tensors, their checksums, a file of each rank; no trial, no draft
    assert [p.name for p in tmp_path.iterdir()] == ([] if scheme == "memory" else ["run"])


@pytest.mark.more
def test_default_root(pool: RankPool, path: str, tmp_path: Path) -> None:
    for scheme in ("bucket", "file"):
        root = f"{scheme}://{tmp_path / scheme}"
        for best, files in pool.run(jobs.default_root, path, root, ranks=2):
            assert best.endswith("checkpoints/epoch=0-step=2.ckpt")
            assert sorted(file.rpartition("/")[2] for file in files) == [
                ".checksums",
                ".metadata",
                "__0_0.distcp",
                "__1_0.distcp",
                "meta.pt",
            ]


def test_old_checkpoints_are_removed(pool: RankPool, path: str, tmp_path: Path) -> None:
    [files] = pool.run(jobs.top_k, path, f"bucket://{tmp_path}/run", ranks=1)
    assert {name.partition("/")[0] for name in files} == {"step=10.ckpt"}


@pytest.mark.parametrize("where", quick(["data", "meta"], "data"))
def test_crash_while_saving(pool: RankPool, path: str, tmp_path: Path, where: str) -> None:
    """What was saved before under the name is still there and loads, and of the new one nothing is left."""
    [(error, before, after, step)] = pool.run(jobs.crash, path, f"bucket://{tmp_path}", where, ranks=1)
    assert "the network is gone" in error
    assert before == after
    assert step == 2


def test_refused_before_training(pool: RankPool, path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {"not shared": "memory://runs", "as a Path": f"file://{tmp_path}", "below a file": f"{tmp_path}/file/runs"}
    patterns = {
        "below a file": f"checkpoints cannot be saved to {tmp_path}/file/runs, because {tmp_path}/file is a file",
        "not shared": "rank 1 does not see what rank 0 has written to memory://runs",
        "as a Path": "give the plain path",
        "save_pretrained": "is in a store",
        "by hand": "memory://by/hand.ckpt is not complete",
        "from a Path": "has a folder named 's3:'",
        "nothing there": "is not a checkpoint of this strategy",
    }
    for messages in pool.run(jobs.refusals, path, str(tmp_path), places, ranks=2):
        for name, pattern in patterns.items():
            assert pattern in messages[name], f"{name}: {messages[name]}"
            assert "\n" not in messages[name]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
