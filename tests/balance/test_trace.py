# SPDX-License-Identifier: Apache-2.0
"""Files of recorded routing."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lightning_moefold.balance.trace import RoutingTrace, read_trace
from lightning_moefold.errors import InputError


def test_counts(tmp_path) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (3, 2, 4, 8)).astype(np.uint16)
    np.savez(tmp_path / "a.npz", counts=counts, iterations=np.array([1, 51, 101]), hidden_size=64, expert_width=32)
    trace = read_trace(tmp_path / "a.npz")
    assert (trace.counts_NLSE == counts).all()
    assert trace.counts_NLSE.dtype == np.int64
    assert trace.iterations_N.tolist() == [1, 51, 101]
    assert (trace.layers, trace.experts, trace.hidden_size, trace.expert_width) == (2, 8, 64, 32)
    np.savez(tmp_path / "b.npz", counts=counts.sum(2), steps=np.array([5, 6, 8]))
    assert read_trace(tmp_path / "b.npz").counts_NLSE.shape == (3, 2, 1, 8)
    assert read_trace(tmp_path / "b.npz").iterations_N.tolist() == [5, 6, 8]
    (tmp_path / "c.json").write_text(json.dumps({"counts": counts.tolist()}))
    assert (read_trace(tmp_path / "c.json").counts_NLSE == counts).all()


def test_sources_are_added_up_or_divided() -> None:
    counts = np.arange(2 * 1 * 4 * 3).reshape(2, 1, 4, 3)
    trace = RoutingTrace(np.arange(2), counts)
    assert (trace.for_sources(2).counts_NLSE == counts.reshape(2, 1, 2, 2, 3).sum(3)).all()
    eight = trace.for_sources(8).counts_NLSE
    assert (eight.reshape(2, 1, 4, 2, 3).sum(3) == counts).all()
    assert (np.ptp(eight.reshape(2, 1, 4, 2, 3), axis=3) <= 1).all()
    three = trace.for_sources(3).counts_NLSE
    assert (three.sum(2) == counts.sum(2)).all()
    assert (np.ptp(three, axis=2) <= 1).all()


def test_a_parquet_file_for_each_layer(tmp_path) -> None:
    ids = np.random.default_rng(0).integers(0, 16, (100, 11, 3))
    for layer in range(11):  # layer 10 behind layer 9
        table = pyarrow.table({"scores": [[0.5] * 3] * 100, "indices": ids[:, layer].tolist()})
        pyarrow.parquet.write_table(table, tmp_path / f"layer_{layer}.parquet")
    np.savez(tmp_path / "same.npz", expert_ids=ids)
    expected, trace = (read_trace(path, 16, window=30) for path in (tmp_path / "same.npz", tmp_path))
    assert trace.counts_NLSE.shape == (3, 11, 1, 16)
    assert (trace.counts_NLSE == expected.counts_NLSE).all()
    for column, wrong in (("indices", [[1, 2], [1]]), ("scores", [[1]]), ("indices", [[1, 2, 3]])):
        pyarrow.parquet.write_table(pyarrow.table({column: wrong}), tmp_path / "layer_3.parquet")
        with pytest.raises(InputError, match=r"layer_3.parquet (has no column 'indices' with|holds 1 tokens)"):
            read_trace(tmp_path)


def test_megatron_lines(tmp_path) -> None:
    for rank in range(2):
        lines = [
            {"step": step, "layer": layer, "num_tokens": 2, "topk": 2, "top_indices": [[0, 1 + rank], [0, 3]]}
            for step in (10, 20) for layer in (3, 1)
        ]  # fmt: skip
        text = "\n".join(map(json.dumps, [*lines, lines[0]]))  # a second micro-batch of the first
        (tmp_path / f"rank{rank}.jsonl").write_text(text + "\n\n")
    trace = read_trace(tmp_path)
    assert trace.counts_NLSE.shape == (2, 2, 2, 4)
    assert trace.counts_NLSE[1, 0].tolist() == [[2, 1, 0, 1], [2, 0, 1, 1]]
    assert trace.counts_NLSE[0, 1, 0].tolist() == [4, 2, 0, 2]
    assert trace.iterations_N.tolist() == [10, 20]
    assert read_trace(tmp_path / "rank0.jsonl", num_experts=6).experts == 6
    with pytest.raises(InputError, match="expert 3 is chosen, but the model has 2 experts"):
        read_trace(tmp_path, num_experts=2)
    (tmp_path / "rank1.jsonl").write_text(json.dumps({"step": 10, "layer": 3, "top_indices": [0]}))
    with pytest.raises(InputError, match="3 pairs of a step and a layer are missing"):
        read_trace(tmp_path)
    (tmp_path / "rank1.jsonl").write_text('{"step": 1}')
    with pytest.raises(InputError, match="rank1.jsonl, line 1: it needs step, layer and top_indices"):
        read_trace(tmp_path)


def test_table_of_expert_ids(tmp_path) -> None:
    ids = np.random.default_rng(0).integers(0, 6, (100, 3, 2)).astype(np.int16)
    ids[7] = -1  # padding
    np.savez(tmp_path / "ids.npz", expert_ids=ids)
    trace = read_trace(tmp_path / "ids.npz", window=25)
    assert trace.counts_NLSE.shape == (4, 3, 1, 6)
    assert (trace.counts_NLSE.sum((0, 2, 3)) == 198).all()
    assert trace.counts_NLSE[1, 2, 0].tolist() == np.bincount(ids[25:50, 2].ravel(), minlength=6).tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [({"other": np.ones(3)}, "has neither an array 'counts' nor 'expert_ids'; it has other"),
     ({"counts": np.ones((2, 3), dtype=int)}, r"counts have the shape \(2, 3\); give \[iterations, layers, experts\]"),
     ({"counts": -np.ones((2, 3, 4), dtype=int)}, "a count is negative"),
     ({"counts": 0.5 * np.ones((2, 3, 4))}, "counts must be whole numbers"),
     ({"counts": np.ones((2, 3, 4), dtype=int), "iterations": np.array([1, 1])}, "iterations must rise"),
     ({"counts": np.ones((2, 3, 4), dtype=int), "iterations": np.arange(3)}, "2 counts need as many iterations"),
     ({"expert_ids": np.ones((2, 3), dtype=int)}, r"expert_ids must be whole numbers \[tokens, layers, k\]")],
)  # fmt: skip
def test_bad_files(tmp_path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_trace(tmp_path / "bad.npz")


def test_a_header_of_python_2_that_does_not_end(tmp_path) -> None:
    """NumPy reads headers that Python cannot with ``tokenize``, whose error is no ValueError."""
    array = io.BytesIO()
    np.save(array, np.ones((2, 3, 4), dtype=int))
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as file:
        file.writestr("counts.npy", array.getvalue().replace(b"4), }", b"4,   "))
    with pytest.raises(InputError, match="is no routing trace"):
        read_trace(tmp_path / "bad.npz")


def test_missing_and_unknown_files(tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_trace(tmp_path / "none.npz")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.npz").write_text("x")
    with pytest.raises(InputError, match="what can be read ends in .npz, .json or .jsonl"):
        read_trace(tmp_path / "a.txt")
    with pytest.raises(InputError, match="is no routing trace"):
        read_trace(tmp_path / "b.npz")
    with pytest.raises(InputError, match="holds no .jsonl or .parquet file"):
        read_trace(tmp_path)
