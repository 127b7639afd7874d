# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels on a machine without a GPU, and what happens where Triton cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_moefold import kernels
from lightning_moefold.kernels import availability

HERE = Path(__file__).parent


@pytest.mark.parametrize("cases", ["not more", pytest.param("more", marks=pytest.mark.more)])
def test_kernels_by_interpreter(cases: str) -> None:
    """``triton_checks.py``, in a process that has not imported Triton yet."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", cases, str(HERE / "triton_checks.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=HERE.parents[1],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_a_cpu_tensor_goes_by_torch() -> None:
    assert not kernels.runs_triton(torch.zeros(1))


@pytest.mark.parametrize(
    ("triton", "compiler", "named"), [(False, True, "the package triton"), (True, False, "a C compiler")]
)
def test_what_is_missing_is_said_once(
    triton: bool, compiler: bool, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused kernels are left out with one warning, and nothing fails."""
    find = availability.importlib.util.find_spec
    found = find("torch") if triton else None
    monkeypatch.setattr(
        availability.importlib.util, "find_spec", lambda name: found if name == "triton" else find(name)
    )
    monkeypatch.setattr(availability, "has_c_compiler", lambda: compiler)
    availability.has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match=named):
            assert not availability.has_triton()
        assert not availability.has_triton()
    finally:
        availability.has_triton.cache_clear()
