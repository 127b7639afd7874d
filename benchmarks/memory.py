# SPDX-License-Identifier: Apache-2.0
"""Memory per rank for each way of data-parallel storage, counted tensor by tensor, beside what the layouts promise.

    python benchmarks/memory.py [--ranks 2 4] [--hidden 512] [--layers 4] ...

Counted are the bytes of the tensors that a rank holds after a step of AdamW (weights, gradients before they are
cleared, optimizer state) and the weights that are gathered between forward and backward. "expected" is the sum over
parameters of the box that ``layout.py`` gives to the rank: 4 bytes of weight, 4 of gradient, 8 of state, and where
weights stay gathered, 4 for each element that the rank computes with. Resident memory is the peak over the steps above
what the process had before the model: it holds activations, and whatever the allocator did not give back.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from loading import PeakMemory
from measuring import RETURN_MEMORY, leave, machine, run_worker

from lightning_moefold import Fold, MoECausalLM, MoEConfig
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.parallel import Settings, Sharding, local_part, parallelize

FOLDS = {2: ["", "| ep2", "tp2 | ep2"], 4: ["", "| ep2", "tp2 | ep4"]}
PARTS = ("weights", "gradients", "state", "gathered")


def work(arguments: argparse.Namespace) -> None:
    """Trains two steps on this rank; rank zero prints the figures of the rank that holds most."""
    dist.init_process_group("gloo")
    fold = Fold.parse(arguments.fold, dist.get_world_size())
    mesh = FoldedMesh(fold, "cpu")
    config = MoEConfig(
        model_type="mixtral", vocab_size=16000, hidden_size=arguments.hidden, num_hidden_layers=arguments.layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=arguments.hidden // 8, intermediate_size=0,
        moe_intermediate_size=arguments.hidden, shared_expert_intermediate_size=0, num_experts=arguments.experts,
        num_experts_per_tok=2, norm_topk_prob=True, router_aux_loss_coef=0.0,
    )  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (1, arguments.length), generator=torch.Generator().manual_seed(fold.dp))
    with PeakMemory() as memory:
        with deferred_weights():
            model = MoECausalLM.from_config(config)
        parallelize(model, mesh, Settings(Sharding(arguments.mode)), torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            between = {id(p): p for p in model.parameters()}
            loss.backward()
            optimizer.step()
            counted = count(model, optimizer, list(between.values()))
            optimizer.zero_grad()
    figures = {"counted": counted, "expected": expect(model, fold, mesh.rank), "resident": memory.above[1]}
    everybody: list[Any] = [None] * fold.world_size
    dist.all_gather_object(everybody, figures)
    leave(max(everybody, key=lambda f: sum(f["counted"].values())))


def count(model: MoECausalLM, optimizer: torch.optim.Optimizer, between: list[torch.Tensor]) -> dict[str, int]:
    """Bytes of the tensors that this rank holds."""
    pieces = list(model.parameters())
    kept = {id(p) for p in pieces}
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    groups: list[list[torch.Tensor]] = [
        [*pieces],
        [p.grad for p in pieces if p.grad is not None],
        states,
        [p for p in between if id(p) not in kept],
    ]
    return {
        part: sum(local_part(t).numel() * t.element_size() for t in tensors)
        for part, tensors in zip(PARTS, groups, strict=True)
    }


def expect(model: MoECausalLM, fold: Fold, rank: int) -> dict[str, int]:
    """The same from the layouts alone."""
    assert model.settings is not None
    stored = sum(layout.stored_box(fold, rank).numel for layout in model.layouts.values()) * 4
    # Full sharding lets go of each layer after its forward, but not of what belongs to the model itself.
    gathered = sum(
        layout.tensor_box(fold.coordinates(rank)).numel * 4
        for name, layout in model.layouts.items()
        if layout.data_dim is not None and (model.settings.sharding.mode == "optimizer" or ".layers." not in name)
    )
    return {"weights": stored, "gradients": stored, "state": 2 * stored, "gathered": gathered}


def run(fold: str, world: int, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    words = ["--fold", fold, "--mode", mode]
    for name in ("hidden", "layers", "experts", "length"):
        words += [f"--{name}", str(getattr(arguments, name))]
    return run_worker("memory.py", words, ranks=world, threads=1, extra=RETURN_MEMORY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", choices=FOLDS, default=list(FOLDS))
    for name, default in (("hidden", 512), ("layers", 4), ("experts", 16), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for hidden in ("fold", "mode"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        work(arguments)
        return
    print(f"Mixtral, {arguments.layers} layers, {arguments.experts} experts, hidden {arguments.hidden}, float32, AdamW, "
          f"{arguments.length} tokens per data rank; MB on the rank that holds most")  # fmt: skip
    print(f"{machine()}\n")
    print("| ranks | fold | sharding | weights | gradients | state | gathered | sum | expected | peak resident |")
    print("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for world in arguments.ranks:
        for fold in FOLDS[world]:
            for mode in ("none", "optimizer", "full"):
                result = run(fold, world, mode, arguments)
                counted, expected = result["counted"], result["expected"]
                total, promise = sum(counted.values()), sum(expected.values())
                cells = " | ".join(f"{counted[part] / 1e6:.1f}" for part in PARTS)
                note = "the same" if counted == expected else f"{promise / 1e6:.1f}"
                print(f"| {world} | `{fold or 'dp'}` | {mode} | {cells} | {total / 1e6:.1f} | {note} | "
                      f"{result['resident'] / 1e6:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
