# SPDX-License-Identifier: Apache-2.0
"""What was found, as markdown."""

from __future__ import annotations

from typing import Any


def cell(value: Any) -> str:
    """A number with three or four digits that count; anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if value != value:
            return "nan"
        if value and (abs(value) < 1e-2 or abs(value) >= 1e6):
            return f"{value:.1e}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Columns in the order in which rows name them; the note comes last."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "note"))
    names += ["note"] if any("note" in row for row in rows) else []
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def part_report(found: dict[str, Any]) -> str:
    """One part: a line on how it went, its tables, what failed."""
    lines = [f"## {found['part']}: {found['status']}, {found['seconds']:.0f} s"]
    for title, rows in found["tables"].items():
        lines += [f"\n{title}\n", markdown_table(rows)]
    if found["errors"]:
        lines += ["\nFailed:\n"] + [f"- {key}: {error['line']}" for key, error in found["errors"].items()]
    if found["left_out"]:
        lines.append(f"\nNo time was left for: {'; '.join(found['left_out'])}")
    return "\n".join(lines) + "\n"


def whole_report(parts: dict[str, dict[str, Any]], heading: str) -> str:
    """All parts."""
    return "\n".join([heading, "", *map(part_report, parts.values())])


def summary(parts: dict[str, dict[str, Any]]) -> str:
    """A line for each part."""
    lines = []
    for name, found in parts.items():
        outcomes = list(found["tries"].values())
        failed = len(outcomes) - outcomes.count("ok") - outcomes.count("not here")
        lines.append(
            f"{name:9} {found['status']}, {found['seconds']:.0f} s: {outcomes.count('ok')} of {len(outcomes)} tries went well"
            + (f", {failed} FAILED" if failed else "")
            + (f", {len(found['left_out'])} without time" if found["left_out"] else "")
        )
    return "\n".join(lines)
