# SPDX-License-Identifier: Apache-2.0
"""Branches for CUDA on a machine without it: fake tensors on ``cuda:0``, with autograd, in a CPU build of torch.

:func:`load` must be called before anybody imports torch, in a process of its own that ends with ``os._exit``: torch tidies up
a device at exit that is not there. Nothing is computed; shapes, dtypes, devices and the order of operations are those of a
CUDA build, whose kernels :mod:`.kernels` stands in for. A C++ compiler builds a small library once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build() -> Path:
    """The library, built if no earlier process has done so for this source and this torch.

    Raises:
        RuntimeError: Where there is no C++ compiler.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_moefold"
    made_of = SOURCE.read_bytes() + version("torch").encode()
    library = folder / f"fake_cuda_{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if (command := compiler()) is None:
        raise RuntimeError("fake CUDA tensors need a C++ compiler; install g++, or name one in CXX.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / library.name
        flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-I{_torch() / 'include'}"]
        subprocess.run([command, *flags, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
        os.replace(made, library)  # whole or not at all: another process may look
    return library


def load() -> None:
    """Puts the device into this process.

    Raises:
        RuntimeError: If torch is imported already, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; call load() first.")
    libraries = [_torch() / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    for library in (*libraries, build()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
