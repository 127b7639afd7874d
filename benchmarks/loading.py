# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory to load a checkpoint of several GB, beside safetensors alone reading the same bytes.

    python benchmarks/loading.py [--gb 4] [--shape qwen2_moe] [--ranks 1 2 4] [--cold] ...

The checkpoint has random weights in bfloat16 and is written in a stream. "safetensors" opens the files and copies the
boxes of this rank's shard out of them, one by one, and nothing else; "moefold" is what the strategy does: model,
parallelisation, reading. Each contender runs in processes of its own and rounds interleave. Before every run the pages
of all files are brought into the page cache (default) or dropped from it (``--cold``), so both find the same state.
Memory is counted from after the imports: anonymous memory, which is the process's own, and with the file pages that the
process has mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import leave, machine, run_worker
from safetensors import safe_open

from lightning_moefold import Fold, MoECausalLM, MoEConfig
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.hf_config import to_hf_config
from lightning_moefold.models.names import parameter_entries
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import Settings, parallelize

FOLDS = {1: [""], 2: ["| ep2", "tp2 | etp2"], 4: ["| ep4", "tp2 | ep2 etp2"]}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts": 8, "moe_intermediate_size": 3584, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 60, "moe_intermediate_size": 704, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 2816, "qkv_bias": True,
    },
}  # fmt: skip
_FILE_BYTES = 1_000_000_000


def make_config(shape: str, gb: float) -> MoEConfig:
    """As many layers as make about ``gb`` GB in bfloat16."""
    fields = {
        "model_type": shape, "vocab_size": 32000, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 2816, "shared_expert_intermediate_size": 0, "router_aux_loss_coef": 0.0,
        **SHAPES[shape],
    }  # fmt: skip
    sizes = [_bytes(MoEConfig(num_hidden_layers=n, **fields)) for n in (1, 2)]
    layers = max(1, round((gb * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    return MoEConfig(num_hidden_layers=layers, **fields)


def _bytes(config: MoEConfig) -> int:
    return sum(2 * torch.Size(entry.shape).numel() for entry in parameter_entries(config).values())


def write_checkpoint(path: Path, config: MoEConfig) -> int:
    """Writes safetensors files tensor by tensor, holding no more than one block of random numbers; returns the bytes."""
    total = _bytes(config)
    free = shutil.disk_usage(path.parent).free
    if total * 1.1 > free:
        raise SystemExit(
            f"the checkpoint takes {total / 1e9:.1f} GB and {path.parent} has {free / 1e9:.1f} GB; use less --gb."
        )
    path.mkdir()
    block = (torch.randn(16 * 1024 * 1024) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for entry in parameter_entries(config).values():
        for source in entry.sources:
            size = 2 * torch.Size(entry.source_shape).numel()
            if filled + size > _FILE_BYTES and files[-1]:
                files.append({})
                filled = 0
            files[-1][source] = entry.source_shape
            filled += size
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        _write_file(path / name, tensors, block)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({**to_hf_config(config), "dtype": "bfloat16"}))
    return total


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], block: bytes) -> None:
    header, start = {}, 0
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while start > 0:
            file.write(block[:start])
            start -= len(block)
        file.flush()
        os.fsync(file.fileno())


def prepare_cache(path: Path, cold: bool) -> None:
    """Brings the pages of all files into the page cache, or drops them."""
    for file in path.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass


# ---- in a rank ---------------------------------------------------------------------------------------------------


class PeakMemory:
    """Peaks of anonymous and of all resident memory above where they began, sampled every 10 ms."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.first = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._note()

    @staticmethod
    def _now() -> tuple[int, ...]:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        anonymous, everything = (int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
        return anonymous, everything

    def _note(self) -> None:
        self.peak = tuple(map(max, self.peak, self._now()))

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self._note()

    @property
    def above(self) -> list[int]:
        """Bytes of anonymous and of all memory."""
        return [p - f for p, f in zip(self.peak, self.first, strict=True)]


def _boxes(path: Path, fold: Fold, rank: int) -> tuple[list[tuple[str, tuple[slice, ...]]], int]:
    """Names on disk and slices of the rank's shard, and its bytes."""
    with deferred_weights():
        model = MoECausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.load_weights = lambda: None  # type: ignore[method-assign]  # layouts are wanted, and memory never touched is free
    parallelize(model, FoldedMesh(fold, "cpu"), Settings(), torch.device("cpu"))
    entries, wanted = parameter_entries(model.config), []
    for name, layout in model.layouts.items():
        box, entry = layout.stored_box(fold, rank), entries[name]  # no expert has moved yet
        if box.numel and entry.stacked:
            wanted += [(source, box.slices()[1:]) for source in entry.sources[box.slices()[0]]]
        elif box.numel:
            wanted.append((entry.sources[0], box.slices()))
    return wanted, 2 * sum(layout.stored_box(fold, rank).numel for layout in model.layouts.values())


def read_alone(path: Path, wanted: list[tuple[str, tuple[slice, ...]]]) -> list[torch.Tensor]:
    """What anybody would write by hand: open each file once, copy each box."""
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    handles = {file: safe_open(str(path / file), framework="pt") for file in set(weight_map.values())}
    return [handles[weight_map[name]].get_slice(name)[slices].clone() for name, slices in wanted]


def work(arguments: argparse.Namespace) -> None:
    """One contender on this rank; rank zero prints everybody's figures."""
    path, world = Path(arguments.checkpoint), int(os.environ.get("WORLD_SIZE", 1))
    dist.init_process_group("gloo", rank=int(os.environ.get("RANK", 0)), world_size=world,
                            store=None if world > 1 else dist.HashStore())  # fmt: skip
    rank, fold = dist.get_rank(), Fold.parse(arguments.fold, world)
    wanted, shard = _boxes(path, fold, rank)
    mesh = FoldedMesh(fold, "cpu")
    dist.barrier()
    with PeakMemory() as memory:
        start = time.perf_counter()
        if arguments.worker == "safetensors":
            kept: Any = read_alone(path, wanted)
        else:
            with deferred_weights():
                kept = MoECausalLM.from_pretrained(path, dtype=torch.bfloat16)
            parallelize(kept, mesh, Settings(), torch.device("cpu"))
        seconds = time.perf_counter() - start
    del kept
    mine = {"seconds": seconds, "shard": shard, "anonymous": memory.above[0], "resident": memory.above[1]}
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, mine)
    leave({key: max(m[key] for m in everybody) for key in mine})


# ---- outside -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_moe")
    parser.add_argument("--ranks", type=int, nargs="+", choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every run")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to write the checkpoint")
    for hidden in ("worker", "fold", "checkpoint"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "model"
        config = make_config(arguments.shape, arguments.gb)
        total = write_checkpoint(path, config)
        cache = "dropped from" if arguments.cold else "in"
        print(f"{arguments.shape}, {config.num_hidden_layers} layers, {config.num_experts} experts, {total / 1e9:.2f} GB bfloat16, "
              f"files {cache} the page cache, median of {arguments.rounds} rounds, slowest and largest rank")  # fmt: skip
        print(f"{machine()}\n")
        print(
            "| ranks | fold | contender | seconds | ratio | GB/s per rank | shard GB | anonymous / shard | resident / shard |"
        )
        print("|--:|---|---|--:|--:|--:|--:|--:|--:|")
        for world in arguments.ranks:
            for fold in FOLDS[world]:
                measure(fold, world, path, arguments)


def measure(fold: str, world: int, path: Path, arguments: argparse.Namespace) -> None:
    """Both contenders under one fold."""
    rounds: dict[str, list[dict[str, float]]] = {"safetensors": [], "moefold": []}
    for _ in range(arguments.rounds):
        for contender, results in rounds.items():
            prepare_cache(path, arguments.cold)
            words = ["--worker", contender, "--fold", fold, "--checkpoint", str(path)]
            results.append(run_worker("loading.py", words, ranks=world, threads=1))
    base = 0.0
    for contender, results in rounds.items():
        figures = {key: statistics.median(r[key] for r in results) for key in results[0]}
        seconds, shard = figures["seconds"], figures["shard"]
        base = base or seconds
        print(f"| {world} | `{fold or 'dp'}` | {contender} | {seconds:.2f} | {seconds / base:.2f} | {shard / seconds / 1e9:.2f} | "
              f"{shard / 1e9:.2f} | {figures['anonymous'] / shard:.2f} | "
            f"{figures['resident'] / shard:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
