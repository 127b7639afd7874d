# SPDX-License-Identifier: Apache-2.0
"""Branches for CUDA, run on fake CUDA tensors: devices, budgets of memory traffic and of waits, operands of kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(fake_cuda.compiler() is None, reason="fake CUDA tensors need a C++ compiler")

QUICK = (
    "one rank, bf16-mixed", "float32, window", "tp, ep", "etp", "cp", "full recomputation", "ring, window", "interleaved", "zbv",
)  # fmt: skip
OTHERS = (
    "one rank, bf16-true", "plain experts", "selective recomputation", "ring", "all-gather", "all-to-all", "1f1b",
)  # fmt: skip
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.more) for name in OTHERS)]

#: Of a layer at 8,192 tokens in bfloat16: elementwise GB at most, and the bound on MFU at least. To be tightened by whoever
#: makes a layer move less (benchmarks/cuda_bytes.py prints what it moves).
BUDGETS = {
    "Mixtral-8x22B": (11.5, 0.69), "Qwen2-57B-A14B": (14.1, 0.65),
    "Mixtral-8x22B, experts in FP8": (41.5, 0.72), "Qwen2-57B-A14B, experts in FP8": (38.0, 0.59),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All parts that are asked for, in one process: starting one costs more than any part."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    models = [f"model: {name}" for name in (*QUICK, *OTHERS) if name in asked]
    command = [
        sys.executable,
        str(Path(__file__).with_name("child.py")),
        "budget",
        "noise",
        "products",
        "flash",
        "runs",
        "sampling",
        *models,
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _part(found: dict[str, Any], name: str) -> Any:
    assert "error" not in found[name], found[name]["error"]
    return found[name]["found"]


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_on_the_device(found: dict[str, Any], name: str) -> None:
    done = _part(found, f"model: {name}")
    assert done["devices"] == ["cuda:0"]
    assert done["missing"] == []


@pytest.mark.parametrize("name", MODELS)
def test_waits_of_a_step(found: dict[str, Any], name: str) -> None:
    """The host asks the device a fixed number of things a step, and none in a layer (whose exchange is stood in for here)."""
    done = _part(found, f"model: {name}")
    in_layers = [
        read for read in done["reads"] if read.split()[-1].split(".")[0] in ("decoder", "moe", "experts", "router")
    ]
    assert in_layers == []
    assert len(done["reads"]) <= 8 * (4 if "pp" in name or name in ("1f1b", "interleaved", "zbv") else 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_deterministic_run_refuses_nothing_of_a_step(found: dict[str, Any], name: str) -> None:
    assert _part(found, f"model: {name}")["refused"] == []


def test_a_deterministic_run_draws_tokens(found: dict[str, Any]) -> None:
    assert _part(found, "sampling") == {"True": [], "False": ["cumsum", "cumsum"]}


@pytest.mark.parametrize("name", BUDGETS)
def test_memory_traffic_of_a_layer(found: dict[str, Any], name: str) -> None:
    figures, (gigabytes, mfu) = _part(found, "budget")[name], BUDGETS[name]
    assert figures["elementwise_gb"] <= gigabytes
    assert figures["mfu"] >= mfu
    assert figures["mfu"] < 0.78  # the rate of the products: more would be a fault of the count


@pytest.mark.parametrize("name", BUDGETS)
def test_a_layer_neither_waits_nor_copies(found: dict[str, Any], name: str) -> None:
    figures = _part(found, "budget")[name]
    assert figures["reads"] == []
    assert figures["moved"] == []


def test_jitter_and_dropout_neither_wait_nor_copy(found: dict[str, Any]) -> None:
    assert _part(found, "noise") == {"reads": [], "moved": [], "refused": []}


def test_grouped_products_have_operands_that_the_kernel_takes(found: dict[str, Any]) -> None:
    done = _part(found, "products")
    assert done["broken"] == []
    assert done["seen"] == [[2, 2], [2, 3]]  # forward and input gradients, and weight gradients
    assert done["planted"].pop("nothing") == []
    assert all(done["planted"].values()), done["planted"]


def test_flash_takes_grouped_heads(found: dict[str, Any]) -> None:
    done = _part(found, "flash")
    assert done == {
        "out": [[2, 8, 32, 64], "torch.bfloat16", "cuda:0"],
        "lse": [[2, 8, 32], "torch.float32", "cuda:0"],
        "q": [[2, 8, 32, 64], "torch.bfloat16", "cuda:0"],
        "k": [[2, 2, 48, 64], "torch.bfloat16", "cuda:0"],
        "v": [[2, 2, 48, 64], "torch.bfloat16", "cuda:0"],
    }


def test_rows_over_ranks_take_one_kernel(found: dict[str, Any]) -> None:
    done = _part(found, "runs")
    assert (done.pop("masks"), done.pop("reads")) == (0, [])
    assert done.pop("kernels") == ["_flash_attention_forward", "_flash_attention_backward"]
    shapes = {"out": [2, 8, 256, 64], "q": [2, 256, 8, 64], "k": [2, 256, 2, 64], "v": [2, 256, 2, 64]}
    assert done == {name: [shape, "torch.bfloat16", "cuda:0"] for name, shape in shapes.items()}
