# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU: how many pass, and why others do not."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from gpu_parts.driver import ROOT
from gpu_parts.record import Context

_OUTCOME = re.compile(r"^(tests/\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def run(ctx: Context) -> None:
    """The part."""
    ctx.record.attempt("outcomes", "tests/gpu", lambda: _pytest(ctx), limit=max(10.0, ctx.record.time_left))


def _pytest(ctx: Context) -> dict[str, int | str]:
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-p", "no:cacheprovider", "tests/gpu"]
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    late = False
    lines: list[str] = []
    path = ctx.scratch / "pytest.txt"
    with path.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(max(5.0, ctx.record.time_left - 4))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            process.wait()
    lines = path.read_text(errors="replace").splitlines()
    print("\n".join(lines), flush=True)
    for line in lines:
        if found := _OUTCOME.match(line):
            outcomes[found[1]] = found[2]
        elif line.startswith(("FAILED ", "ERROR ")):
            name, _, reason = line.split(" ", 1)[1].partition(" - ")
            reasons[name] = reason[:200]
    counts = Counter(outcomes.values())
    for name, outcome in outcomes.items():
        if outcome in ("FAILED", "ERROR"):
            ctx.record.row(
                "not passed", test=name.removeprefix("tests/gpu/"), outcome=outcome, note=reasons.get(name, "")
            )
    for name, reason in reasons.items():  # of a file that could not be read
        if name not in outcomes:
            ctx.record.row("not passed", test=name, outcome="ERROR", note=reason)
    ctx.record.detail("outcomes", outcomes)
    cells: dict[str, int | str] = {kind.lower(): counts[kind] for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    if late:
        cells["note"] = f"ended for want of time, at {lines[-1][:120] if lines else 'the start'}"
    elif process.returncode not in (0, 1, 5):
        cells["note"] = f"pytest ended with {process.returncode}: {lines[-1][:150] if lines else ''}"
    return cells
