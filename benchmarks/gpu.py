# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one command on one GPU, without a network, in less than nine minutes.

    python3 benchmarks/gpu.py [--out DIR] [--only layers,packed] [--skip trainer] [--resume] [--budget SECONDS]
    python3 benchmarks/gpu.py --rehearse        # everything in small, on CPU, measures nothing

Parts, in order of worth:

    machine    versions, copy bandwidth, a large product
    tests      pytest tests/gpu
    correct    default optimizers, attention against a plain softmax in float64, cross-entropy, save and resume, text,
               recomputation, equal bits of equal steps; state and activations in host memory, saves in the background, FP8 and
               adapters with dropout beside runs without them
    layers     a decoder layer of Mixtral-8x22B and of Qwen2-57B-A14B on 8,192 tokens, beside Hugging Face's, compiled, beside
               a dense layer of equal FLOPs and its products alone; the longest kernels
    packed     rows of several documents and sliding windows, beside one causal row
    pieces     grouped products, sums, norms, activations, sorting, attention kernels, cross-entropy
    trainer    training steps of a model of a billion parameters under the Trainer, beside Hugging Face's model
    launches   kernels and waits of the host per layer and step, memory of the allocator

Each part runs in a process of its own with a time budget. `gpu.json`, `gpu.md` and `gpu.log` in the folder are written
while it runs; a part, or a single try, that fails or hangs costs itself only.

FLOPs are those of matrix products: 2 per weight that a token visits and per key that it sees, causal, times 3 for forward and
backward: 6 * parameters * tokens + attention. MFU is relative to the datasheet's dense peak (989 TFLOP/s, H100 and H200).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # neither the project nor this folder has to be installed

from gpu_parts import driver, worker  # noqa: E402


def main() -> int:
    """The command; returns its exit status: 0 unless nothing could be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "gpu", help="where results go (%(default)s)")
    parser.add_argument("--only", type=driver.parts_of, help="these parts, separated by commas")
    parser.add_argument("--skip", type=driver.parts_of, default=[], help="all but these parts")
    parser.add_argument("--resume", action="store_true", help="keep what the folder holds, and run the other parts")
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on CPU: shows that everything runs")
    parser.add_argument("--worker", type=driver.parts_of, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker.work(args.worker, args.work, args.budget, args.rehearse)
    return driver.drive(args.out, args.only or list(driver.PARTS), args.skip, args.resume, args.budget, args.rehearse)


if __name__ == "__main__":
    sys.exit(main())
