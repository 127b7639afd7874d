# SPDX-License-Identifier: Apache-2.0
"""Checkpoints saved under one fold and loaded under another, pair by pair: every tensor and all optimizer state, bit for bit.

    python benchmarks/fold_pairs.py [--ranks 8] [--families mixtral qwen2_moe qwen3_moe] [--reach 2]

Under each fold two steps of AdamW are trained and saved in the middle of an epoch. The list of folds is a ring: each checkpoint is
loaded under the ``--reach`` folds before and after its own, so every pair is met in both directions. What the ranks then hold is
assembled and compared with what the ranks of the saving fold hold after loading their own. Families take turns. Exit status 0 if
all agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the jobs of the tests

from lightning_moefold.testing import RankPool, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.checkpoint import jobs_resume

FOLDS = {
    8: (
        "| ep8", "tp2 | ep4 etp2", "pp2 tp2 | ep2 etp2", "cp2 | ep4", "tp4 | ep2 etp2", "", "pp2 | ep4", "tp2 cp2 | etp2 ep2",
        "tp2 | ep4", "pp4 | ep2", "pp2 cp2 | etp4", "tp8 | etp8",
    ),
    4: ("| ep4", "tp2 | ep2 etp2", "pp2 | ep2", "cp2 | ep2", "", "tp4 | etp4", "pp2 tp2 | etp2"),
    2: ("| ep2", "tp2 | etp2", "", "cp2 | ep2"),
}  # fmt: skip
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def whole(reports: list[Any], part: str) -> dict[str, torch.Tensor]:
    return assemble(getattr(report, part) for report in reports)


def differences(a: list[Any], b: list[Any]) -> list[str]:
    """Names of weights and states that are not the same bits."""
    found = []
    for part in ("loaded", "loaded_state"):
        ours, theirs = whole(a, part), whole(b, part)
        found += sorted(set(ours) ^ set(theirs))
        found += [name for name in set(ours) & set(theirs) if not torch.equal(ours[name], theirs[name])]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=FOLDS, default=8)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--reach", type=int, default=2)
    arguments = parser.parse_args()
    folds, pairs, faults, tensors = FOLDS[arguments.ranks], 0, 0, 0
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "num_experts": 8, "vocab_size": 97, "num_attention_heads": 8,
                             "num_key_value_heads": 8, "hidden_size": 64}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, RankPool(arguments.ranks) as pool:
        paths = {}
        for family in arguments.families:
            paths[family] = str(make_checkpoint(Path(scratch, family), family, **sizes))
        for i, fold in enumerate(folds):
            family = arguments.families[i % len(arguments.families)]
            folder, begin = Path(scratch, str(i)), time.monotonic()
            limits = {"ranks": arguments.ranks, "timeout": 300.0}
            pool.run(jobs_resume.save_two, paths[family], fold, str(folder), **limits)
            checkpoint = str(folder / "step=2.ckpt")
            near = [step for j in range(1, arguments.reach + 1) for step in (j, -j)]
            others = list(dict.fromkeys(folds[(i + j) % len(folds)] for j in near if j % len(folds)))
            outcome = pool.run(jobs_resume.load_only, paths[family], [fold, *others], checkpoint, **limits)
            own = [reports[0] for reports in outcome]
            tensors += len(whole(own, "loaded")) + len(whole(own, "loaded_state"))
            for j, other in enumerate(others, 1):
                wrong = differences([reports[j] for reports in outcome], own)
                pairs += 1
                faults += bool(wrong)
                if wrong:
                    print(f"{family}: {fold!r} -> {other!r}: {len(wrong)} differ, {wrong[:3]}", flush=True)
            print(f"{family}: {fold!r} -> {others}, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{pairs} pairs on {arguments.ranks} ranks, {tensors} tensors in the checkpoints, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
