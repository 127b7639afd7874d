"""Makes the repository's virtual environment `.venv`, or finds it made. Called by the Makefile.

    python3 scripts/setup_env.py {demo,test,docs}

Needs nothing but Python's standard library. A call costs a few milliseconds once all is installed. What is
installed is recorded in `.venv/.setup.json`:

- while pip works, the record says so; a record that still says so at the next call belongs to an interrupted
  installation, and the environment is made anew;
- the record holds a hash of pyproject.toml; when that changes, pip brings the environment up to date;
- the record holds the interpreter and the place; a moved repository or another interpreter makes it anew.

A `.venv` without a record was made by somebody else. It is completed where it is, or refused; not deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
RECORD = VENV / ".setup.json"
LOCK = VENV / ".setup.lock"

EXTRA_OF = {"demo": "demo", "test": "dev", "docs": "docs"}
INCLUDES = {"demo": {"demo"}, "test": {"demo", "test"}, "docs": {"docs"}}  # the extra `dev` contains `demo`

# Without an NVIDIA GPU we want this build: PyPI's Linux wheels bring gigabytes of CUDA libraries.
CPU_BUILD = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PIP = (22, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or complete the virtual environment .venv.")
    parser.add_argument("profile", choices=sorted(EXTRA_OF))
    profile = parser.parse_args().profile
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python must be told so
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: set MOEFOLD_PYTHON to a newer one")
    with exclusive():
        provide(profile)


def provide(profile: str) -> None:
    """Installs the profile unless the record says that this is done."""
    wanted = {
        "interpreter": [f"{sys.version_info[0]}.{sys.version_info[1]}", sys.base_prefix, str(ROOT)],
        "requirements": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
    }
    record = read_record()
    made_here = record is not None
    whole = not made_here or (record["interpreter"] == wanted["interpreter"] and not record["installing"])
    usable = whole and VENV_PYTHON.exists()
    current = usable and made_here and record["requirements"] == wanted["requirements"]
    if current and profile in record["profiles"]:
        return

    started = time.monotonic()
    if not usable:
        create_venv(made_here)
    elif not made_here:
        check_foreign_venv()
    before = record["profiles"] if current else []
    write_record({**wanted, "profiles": before, "installing": True})
    try:
        install(EXTRA_OF[profile])
    except subprocess.CalledProcessError as error:
        # pip has undone its own transaction: the environment is whole, only incomplete.
        write_record({**wanted, "profiles": [], "installing": False})
        sys.exit(f"setup: `{' '.join(map(str, error.cmd))}` failed with status {error.returncode}")
    write_record({**wanted, "profiles": sorted(INCLUDES[profile].union(before)), "installing": False})
    say(f".venv is ready for `make {profile}` ({time.monotonic() - started:.0f} s)")


# --- the environment -------------------------------------------------------------------------------------------


def create_venv(made_here: bool) -> None:
    entries = [path for path in VENV.iterdir() if path != LOCK]  # it stays: others may be waiting for it
    if entries and not made_here:
        sys.exit(f"setup: {VENV} holds no working Python and was not made here: remove it and try again")
    # The base interpreter, as the one that runs us may be among what is now deleted.
    python = getattr(sys, "_base_executable", None) or sys.executable
    say(f"making .venv with {python} (Python {sys.version.split()[0]})")
    # First of all, so that what a killed process leaves does not look like somebody else's environment.
    write_record({"interpreter": [], "requirements": "", "profiles": [], "installing": True})
    for path in entries:
        if path == RECORD:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if subprocess.run([python, "-m", "venv", VENV]).returncode != 0:
        sys.exit("setup: `python -m venv` failed; on Debian and Ubuntu it is in the package python3-venv")


def check_foreign_venv() -> None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = output([VENV_PYTHON, "-c", code])
    if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        sys.exit(
            f"setup: {VENV} was not made here and has Python {version or '?'}, not {sys.version.split()[0]}: "
            "remove it, or set MOEFOLD_PYTHON"
        )


def install(extra: str) -> None:
    """Torch first, so that no later requirement chooses its build; then the package with its extra."""
    provide_pip()
    torch = installed_torch()
    if torch and in_range(torch, torch_requirement()):
        say(f"torch {torch}: kept")
    else:
        install_torch()
        torch = installed_torch()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={torch}\n")
        say(f"installing lightning-moefold[{extra}] ...")
        pip("--editable", f".[{extra}]", "--constraint", constraints)
    if installed_torch() != torch:
        sys.exit(f"setup: torch was {torch} and is now {installed_torch()}: remove .venv and report this")


def provide_pip() -> None:
    version = output([VENV_PYTHON, "-I", "-m", "pip", "--version"])
    if version is None:
        subprocess.run([VENV_PYTHON, "-I", "-m", "ensurepip"], check=True)
        version = output([VENV_PYTHON, "-I", "-m", "pip", "--version"]) or "pip 0.0"
    if numbers(version.split()[1]) < OLDEST_PIP:
        pip("--upgrade", "pip")


# --- torch -----------------------------------------------------------------------------------------------------


def install_torch() -> None:
    requirement = torch_requirement()
    if has_nvidia_gpu():
        say(f"torch: an NVIDIA GPU is here, installing {requirement} ...")
        pip(requirement)
        cuda = output([VENV_PYTHON, "-I", "-c", "import torch; print(torch.version.cuda or '')"])
        chosen = f"the CUDA {cuda} build" if cuda else "a build without CUDA, the only one that pip's settings offer"
    elif sys.platform != "linux":
        say(f"torch: installing {requirement} ...")
        pip(requirement)
        chosen = "the build for this system"
    else:
        chosen = install_cpu_build()
    say(f"torch {installed_torch()}: {chosen}")


def install_cpu_build() -> str:
    """Installs torch without CUDA if there is a way to; returns how.

    `+cpu` is part of the version, so the first two tries fail at once, without a download, where pip sees no such
    build. Only the last one can bring CUDA libraries.
    """
    say(f"torch: no NVIDIA GPU, installing {CPU_BUILD} ...")
    if pip_succeeds(CPU_BUILD):
        return "the CPU build that pip's settings offer"
    if pip_succeeds(CPU_BUILD, "--extra-index-url", CPU_INDEX, "--timeout", "20", "--retries", "1"):
        return "the CPU build of PyTorch's own index"
    plain = CPU_BUILD.split("+")[0]
    say(f"torch: no CPU build in pip's settings or at {CPU_INDEX}; installing {plain}, which may be a large CUDA build")
    pip(plain)
    return "pip's default build"


def has_nvidia_gpu() -> bool:
    try:
        listing = output(["nvidia-smi", "-L"])
    except OSError:
        return False
    return listing is not None and "GPU" in listing


def installed_torch() -> str | None:
    """The version of the torch that can be imported in the environment."""
    return output([VENV_PYTHON, "-I", "-c", "import torch; print(torch.__version__)"])


def torch_requirement() -> str:
    """The range of torch in pyproject.toml (tomllib is not in Python 3.10)."""
    match = re.search(r'"(torch>=[\d.]+,<[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    if match is None:
        sys.exit('setup: pyproject.toml no longer has a requirement of the form "torch>=A,<B"')
    return match.group(1)


def in_range(version: str, requirement: str) -> bool:
    low, end = (numbers(bound) for bound in requirement[len("torch>=") :].split(",<"))
    return low <= numbers(version) < end


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers: (2, 13, 0) for 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


# --- processes, the record and the lock ------------------------------------------------------------------------


def pip_command(*arguments: str | Path) -> list[str | Path]:
    """The command that installs; modules are compiled when they are first imported, and most never are."""
    options = ["-qq", "--no-input", "--disable-pip-version-check", "--no-compile"]
    return [VENV_PYTHON, "-I", "-m", "pip", "install", *options, *arguments]


def pip(*arguments: str | Path) -> None:
    """Runs pip in the environment; raises if it fails. Its errors are seen, its progress and warnings are not."""
    subprocess.run(pip_command(*arguments), cwd=ROOT, check=True)


def pip_succeeds(*arguments: str | Path) -> bool:
    """Runs pip where failure is an answer, so its errors are not shown."""
    return subprocess.run(pip_command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def output(command: list[str | Path]) -> str | None:
    """What the command prints, or None if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def read_record() -> dict | None:
    try:
        return json.loads(RECORD.read_text())
    except FileNotFoundError:
        return None


def write_record(record: dict) -> None:
    draft = RECORD.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1))
    os.replace(draft, RECORD)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One set-up at a time: a second one waits, and then finds the work done."""
    VENV.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of .venv is running, waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


if __name__ == "__main__":
    main()
