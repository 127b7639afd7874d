# SPDX-License-Identifier: Apache-2.0
"""Tests of whether Triton kernels can run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from functools import cache

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def runs_triton(*tensors: Tensor) -> bool:
    """Whether a Triton kernel can take these tensors.

    It can if they are real CUDA tensors of at most 32 bits (or CPU tensors under ``TRITON_INTERPRET=1``, for tests).
    While ``torch.compile`` traces, the answer is no, because the compiler fuses PyTorch's operations itself.
    """
    if torch.compiler.is_compiling() or not all(
        type(x) in (Tensor, torch.nn.Parameter) and (x.dtype in _DTYPES or not x.is_floating_point()) for x in tensors
    ):
        return False
    if all(x.is_cuda for x in tensors):
        return has_triton()
    return all(x.device.type == "cpu" for x in tensors) and _interprets()


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@cache
def has_triton() -> bool:
    """Whether Triton is installed and finds the C compiler and the Python headers that it needs to build its launchers.

    Without them each kernel falls back to PyTorch's operations, and a warning says so once.
    """
    if importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    elif not has_c_compiler():
        missing = "a C compiler (set CC, or install gcc)"
    elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing = "Python's headers (the package python3-dev of most systems)"
    else:
        return True
    warnings.warn(f"fused kernels need {missing}; layers run slower without.", stacklevel=2)
    return False


def has_c_compiler() -> bool:
    """Whether a C compiler is on the path or named by ``CC``."""
    named = os.environ.get("CC", "").split()
    return any(shutil.which(name) for name in (*named[:1], "gcc", "clang", "cc"))
