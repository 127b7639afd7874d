# SPDX-License-Identifier: Apache-2.0
"""Starts a process for each part, watches it, and writes down what it has found so far. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts import report

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "benchmarks" / "gpu.py"


@dataclass(frozen=True)
class Budget:
    """Seconds of a part, the start of its process included.

    Args:
        most: After so many its process is ended.
        least: With fewer left it is not begun.
    """

    most: float
    least: float


#: In order of worth.
PARTS = {
    "machine": Budget(40, 15),
    "tests": Budget(110, 40),
    "correct": Budget(110, 30),
    "layers": Budget(165, 45),
    "packed": Budget(45, 25),
    "pieces": Budget(75, 25),
    "trainer": Budget(110, 50),
    "launches": Budget(35, 20),
}
#: Of a rehearsal on a busy machine, in which all parts but the tests share a process.
_REHEARSAL = Budget(500, 0)
_MOST_STARTS = 5  # of a part whose tries end its process


def parts_of(text: str) -> list[str]:
    """Names of parts, separated by commas, in their own order."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown part {unknown[0]!r}: there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def drive(out: Path, only: list[str], skip: list[str], resume: bool, budget: float, rehearse: bool) -> int:
    """Runs parts until the time is over. Returns 0 if any has found something."""
    deadline = time.monotonic() + budget
    results = Results(out, resume, rehearse)
    chosen = [name for name in only if name not in skip]
    for name in [name for name in chosen if results.has(name)]:
        print(f"{name}: known already")
        chosen.remove(name)
    groups = [[name] for name in chosen]
    if rehearse:  # a process takes seconds to start
        groups = [[n for n in chosen if n != "tests"], [n for n in chosen if n == "tests"]]
    with tempfile.TemporaryDirectory(prefix="moefold-gpu-", ignore_cleanup_errors=True) as work:
        for group in filter(None, groups):
            left = deadline - time.monotonic()
            limits = _REHEARSAL if rehearse else PARTS[group[0]]
            if left < limits.least:
                for name in group:
                    results.note(name, f"left out: {left:.0f} s are left of --budget, and it needs {limits.least:.0f}")
                continue
            _Group(group, Path(work), results, min(limits.most, left), rehearse).run()
            for name in group:
                print(report.part_report(results.parts[name]), flush=True)
    print(report.summary(results.parts))
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}", flush=True)
    return 0 if any("ok" in found["tries"].values() for found in results.parts.values()) else 1


class Results:
    """The files in the output folder.

    Args:
        out: The folder; made if absent.
        resume: Go on from the files that are there.
        rehearse: Whether figures mean nothing.
    """

    def __init__(self, out: Path, resume: bool, rehearse: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown, self.log = out / "gpu.json", out / "gpu.md", out / "gpu.log"
        self._rehearse, self.parts = rehearse, dict[str, dict[str, Any]]()
        if resume and self.json.exists():
            known = json.loads(self.json.read_text())
            if known["rehearsal"] == rehearse:
                self.parts = known["parts"]
        if not resume:
            self.log.write_text("")

    def has(self, name: str) -> bool:
        """Whether a part is there, and whole."""
        return self.parts.get(name, {}).get("status") == "done" and not self.parts[name]["left_out"]

    def put(self, name: str, found: dict[str, Any]) -> None:
        """What a part has found so far; writes the files."""
        self.parts[name] = found
        order = [name for name in PARTS if name in self.parts]
        self.parts = {name: self.parts[name] for name in order}
        heading = "# GPU run" + (", a REHEARSAL on CPU in small: its figures mean nothing" if self._rehearse else "")
        state = {"rehearsal": self._rehearse, "python": platform.python_version(), "parts": self.parts}
        for path, text in (
            (self.json, json.dumps(state, indent=1)),
            (self.markdown, report.whole_report(self.parts, heading)),
        ):
            new = path.with_suffix(path.suffix + ".new")
            new.write_text(text)
            os.replace(new, path)

    def note(self, name: str, status: str) -> None:
        """Says how a part went that has left nothing."""
        empty: dict[str, Any] = {"tables": {}, "tries": {}, "errors": {}, "details": {}, "left_out": [], "seconds": 0.0}
        print(f"{name}: {status}", flush=True)
        known = self.parts.get(name, empty | {"part": name})
        spent = time.time() - known["began"] if "began" in known else 0.0
        self.put(name, known | {"status": status, "seconds": round(spent, 1)})


class _Group:
    """Parts that share a process; another goes on where it ends before they do.

    Args:
        names: Of the parts.
        work: Where the processes leave what they find.
        results: Where it goes.
        seconds: For all.
        rehearse: Whether it is in small.
    """

    def __init__(self, names: list[str], work: Path, results: Results, seconds: float, rehearse: bool) -> None:
        self.names, self.work, self.results, self.rehearse = names, work, results, rehearse
        self.deadline = time.monotonic() + seconds
        self._seen: dict[str, float] = {}

    def run(self) -> None:
        for start in range(_MOST_STARTS):
            why = self._one_process()
            open_parts = [name for name in self.names if self._state(name).get("status") not in ("done", "failed")]
            if not open_parts:
                break
            tried = self._blame(open_parts, why)
            if not tried or self.deadline - time.monotonic() < 15 or start + 1 == _MOST_STARTS:
                self._collect()
                for name in open_parts:
                    self.results.note(name, why)
                break
            print(f"{tried}: {why}; another process goes on with the next try", flush=True)
        self._collect()

    def _one_process(self) -> str:
        """Returns why it ended."""
        begin = time.monotonic()
        seconds = self.deadline - begin
        command = [sys.executable, str(DOOR), "--worker", ",".join(self.names), "--work", str(self.work)]
        command += ["--budget", f"{seconds - 3:.0f}"] + ["--rehearse"] * self.rehearse
        with self.results.log.open("a") as log:
            log.write(f"==== {' '.join(self.names)}\n")
            log.flush()
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=_environment(self.rehearse, self.work),
                process_group=0 if sys.version_info >= (3, 11) else None,
            )  # fmt: skip
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    self._collect()
                    if time.monotonic() > self.deadline:
                        _end(process)
                        return f"ended after {time.monotonic() - begin:.0f} s, its budget"
                    if late := self._late():
                        _end(process)
                        return late
            finally:
                if process.poll() is None:
                    _end(process)
        code = process.returncode
        return "done" if code == 0 else f"its process died (exit status {code}): {_last_line(self.results.log)}"

    def _late(self) -> str | None:
        for name in self.names:
            doing = self._state(name).get("doing")
            if doing and time.time() - doing["since"] > doing["limit"] * (6 if self.rehearse else 1):
                return f"ended, as one try took more than {doing['limit']:.0f} s"
        return None

    def _state(self, name: str) -> dict[str, Any]:
        path = self.work / f"{name}.json"
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return {}

    def _collect(self) -> None:
        """Takes over what parts have written since."""
        for name in self.names:
            path = self.work / f"{name}.json"
            with contextlib.suppress(FileNotFoundError):
                if (changed := path.stat().st_mtime) != self._seen.get(name):
                    self._seen[name] = changed
                    self.results.put(name, self._state(name))

    def _blame(self, names: list[str], why: str) -> str | None:
        """Writes the try that ended a process into its part's file, so that the next one leaves it out."""
        for name in names:
            state = self._state(name)
            if doing := state.get("doing"):
                key = doing["key"]
                state["tries"][key], state["doing"] = "ended", None
                state["errors"][key] = {"line": why, "trace": ""}
            elif not state or state.get("status") != "lost":
                continue
            else:
                key = name
            (self.work / f"{name}.json").write_text(json.dumps(state))
            return str(key)
        return None


def _environment(rehearse: bool, work: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cache = work / "inductor"
    changes = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"),
               "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    if rehearse:
        changes |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {**os.environ, **changes}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Has a process say where it stands (it goes to the log), then ends it and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        if sys.version_info >= (3, 11):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace")[-4000:].splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
