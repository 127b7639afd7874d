# SPDX-License-Identifier: Apache-2.0
"""Everything about a run drawn together: fold, model, routing, lengths, schedule. And checkpoints with skewed routers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_moefold import Fold
from lightning_moefold.parallel.pipeline.plan import SCHEDULES, V_SHAPED, PipelinePlan
from lightning_moefold.testing import make_checkpoint
from tests.exactness.matrix import FACTORS, Row

#: How a router is made to choose: as it comes; always the first expert (and any others); never the last ones; with great or
#: hardly any preference.
ROUTINGS = ("plain", "one takes all", "some empty", "sharp", "flat")


@dataclass(frozen=True)
class Run:
    """One draw; hypothesis prints it when a run fails.

    Attributes:
        fold: Of the parallel run.
        model: Family and fields of its config.
        routing: One of :data:`ROUTINGS`.
        row: The factors of training.
        length: Positions of a row.
        frozen: Patterns of names.
        seed: Of weights and tokens.
    """

    fold: str
    world: int
    model: dict[str, Any]
    routing: str
    row: Row
    length: int
    frozen: tuple[str, ...]
    seed: int

    def write(self, folder: Path) -> Path:
        """Writes the checkpoint into ``folder``."""
        fields = {name: value for name, value in self.model.items() if name != "family"}
        make_checkpoint(folder, self.model["family"], seed=self.seed, **fields)
        skew(folder, self.routing, self.model["num_experts_per_tok"])
        return folder


@st.composite
def runs(draw: st.DrawFn, worlds: tuple[int, ...]) -> Run:
    """Runs that are legal; sizes as small as the fold lets them be."""
    fold = draw(st.sampled_from([fold for world in worlds for fold in Fold.enumerate(world)]))
    plan, microbatches = draw(_pipelines(fold))
    split_backward = plan.schedule in ("interleaved_zero_bubble", *V_SHAPED) and fold.pp > 1
    tied = draw(st.booleans()) and not (fold.pp > 1 and plan.schedule in V_SHAPED)
    model = draw(_models(fold, plan, tied))
    heads = (model["num_attention_heads"], model["num_key_value_heads"])
    exchange = draw(st.sampled_from(FACTORS["exchange"])) if fold.cp > 1 else None
    assume(exchange != "all_to_all" or all(n % (fold.tp * fold.cp) == 0 for n in heads))
    row = {
        "accumulate": draw(st.sampled_from([1, 2])),
        "auxiliary": draw(st.booleans()),
        "microbatches": microbatches,
        "uneven rows": draw(st.booleans()),
        "padding": draw(st.sampled_from(FACTORS["padding"])),
        "documents": draw(st.booleans()),
        "ignore": draw(st.sampled_from(FACTORS["ignore"] if fold.dp > 1 else ["none", "uneven"])),
        "sharding": draw(st.sampled_from(["optimizer", "none"] if split_backward else FACTORS["sharding"])),
        "optimizer": draw(st.sampled_from(FACTORS["optimizer"])),
        "recompute": None if split_backward else draw(st.sampled_from(FACTORS["recompute"])),
        "dispatch": draw(st.sampled_from(FACTORS["dispatch"])),
        "exchange": exchange,
        "schedule": plan.schedule if fold.pp > 1 else None,
    }
    patterns = ["*.mlp.gate.weight", "*.experts.*", "*layernorm*", "model.embed_tokens.*", "model.layers.0.*"]
    frozen = tuple(draw(st.lists(st.sampled_from(patterns), max_size=2, unique=True)))
    # Where every query has but one key to attend to, its gradient is zero in exact arithmetic and rounding in ours.
    length = draw(st.integers(5, 13))
    return Run(
        str(fold),
        fold.world_size,
        model,
        draw(st.sampled_from(ROUTINGS)),
        row,
        length,
        frozen,
        draw(st.integers(0, 99)),
    )


@st.composite
def _pipelines(draw: st.DrawFn, fold: Fold) -> tuple[PipelinePlan, int]:
    schedule = draw(st.sampled_from(SCHEDULES)) if fold.pp > 1 else "1f1b"
    plan = PipelinePlan(schedule, 2 if schedule.startswith("interleaved") or schedule in V_SHAPED else 1)
    counts = [1, 2, 3, 4, 5, 8] if fold.pp > 1 else [1, 2, 3]
    return plan, draw(st.sampled_from([m for m in counts if _runs(plan, fold.pp, m)]))


def _runs(plan: PipelinePlan, pp: int, microbatches: int) -> bool:
    try:
        plan.check(pp, microbatches, "optimizer")
    except ValueError:
        return False
    return True


@st.composite
def _models(draw: st.DrawFn, fold: Fold, plan: PipelinePlan, tied: bool) -> dict[str, Any]:
    family = draw(st.sampled_from(FACTORS["family"]))
    kv, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    while kv * group < fold.tp:  # a head is never cut
        group += 1
    # With all experts chosen, or one alone of weight one, a router's gradient would be nothing but rounding.
    top = draw(st.integers(2, 3))
    experts = fold.ep * draw(st.integers(top // fold.ep + 1, 5))
    model = {
        "family": family,
        "num_hidden_layers": (fold.pp * plan.chunks if fold.pp > 1 else 1) + draw(st.integers(0, 1)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "hidden_size": kv * group * draw(st.sampled_from([2, 4])),
        "num_experts": experts,
        "num_experts_per_tok": top,
        "vocab_size": draw(st.integers(20, 70)),
        "tie_word_embeddings": tied,
    }
    width = fold.etp * draw(st.integers(1, 5))
    if family == "mixtral":
        return {**model, "intermediate_size": width}
    model |= {"moe_intermediate_size": width, "intermediate_size": fold.tp * draw(st.integers(1, 5))}
    dense = draw(st.integers(0, model["num_hidden_layers"] - 1))
    model["mlp_only_layers"] = [dense] if model["num_hidden_layers"] > 1 and draw(st.booleans()) else []
    if family == "qwen2_moe":
        model["shared_expert_intermediate_size"] = fold.tp * draw(st.integers(1, 5))
    return model


def skew(path: Path, routing: str, top: int) -> None:
    """Changes the routers of a checkpoint.

    Every embedding gets a large part in common, so that what a router sees points into one direction, more or less; a
    row along it, or against it, wins or loses always. Not by more than some units, or softmax would be saturated, and
    gradients the rounding errors of differences.
    """
    if routing == "plain":
        return
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight") and routing in ("one takes all", "some empty"):
            tensors[name] = tensor + 6.0
        elif name.endswith(".gate.weight"):
            tensors[name] = _skewed(tensor, routing, top)
    save_file(tensors, file, {"format": "pt"})


def _skewed(router_EH: torch.Tensor, routing: str, top: int) -> torch.Tensor:
    if routing in ("sharp", "flat"):
        return router_EH * {"sharp": 3.0, "flat": 1e-3}[routing]
    quiet_EH = router_EH * 0.1
    if routing == "one takes all":
        quiet_EH[0] += 6.0 / router_EH.shape[1]
    else:
        quiet_EH[max(top, len(quiet_EH) // 2) :] -= 6.0 / router_EH.shape[1]
    return quiet_EH
