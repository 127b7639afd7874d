# SPDX-License-Identifier: Apache-2.0
"""Pipeline schedules: which rank holds which layers, how long ranks wait, and how many micro-batches are in flight. Pure Python.

Times per micro-batch and rank: F forward, B whole backward, W the part of B that computes weight gradients. For p equal
stages, M micro-batches and v chunks per rank, a step takes ``M (F + B) + bubble`` with

    ==========================  =========================================  =====================================
    schedule                    bubble                                     micro-batches in flight, first rank
    ==========================  =========================================  =====================================
    gpipe                       (p-1) (F + B)                              M
    1f1b                        (p-1) (F + B)                              min(M, p)
    interleaved_1f1b            (p-1)/v (F + B)                            p (1 + (p-1)/(p v)), chunks: 2(p-1)+(v-1)p+1
    interleaved_zero_bubble     (p-1)/v max(0, F + B - 2 W)                as interleaved_1f1b
    zbv (v = 2)                 (p-1)/2 max(0, F + B - 3 W)                p
    dualpipev (v = 2)           (p-1)/2 max(0, F + B - 3 W)                p + 1/2
    ==========================  =========================================  =====================================

Sources: Narayanan et al. 2021 (1f1b, interleaved), Qi et al. 2023, 2024 (zero bubble, V shape; their B is our B - W),
DeepSeek's DualPipe notes. With unequal stages the slowest one sets the pace and the others only fill the pipeline once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lightning_moefold.errors import InputError
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.modules.recompute_parts import parse_recompute
from lightning_moefold.parallel.pipeline.plan import SCHEDULES, V_SHAPED, PipelinePlan, stage_owner


@dataclass(frozen=True)
class RankLayers:
    """The part of the model that one pipeline rank holds.

    Args:
        moe: Number of layers with experts.
        dense: Number of layers without experts.
        first: Whether it holds the embedding.
        last: Whether it holds the final norm and the head.
    """

    moe: int
    dense: int
    first: bool = False
    last: bool = False

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.moe + self.dense


@lru_cache(maxsize=4096)
def stage_layers(model: MoEConfig, pp: int, chunks: int, schedule: str) -> tuple[range, ...]:
    """Returns the layers of every stage, cut as by the strategy: by cost, the head included."""
    return tuple(PipelinePlan(schedule, chunks).layers(model, pp))


@lru_cache(maxsize=4096)
def pipeline_layout(model: MoEConfig, pp: int, chunks: int, schedule: str) -> tuple[RankLayers, ...]:
    """Returns the layers that each of the ``pp`` ranks holds, with ``chunks`` chunks per rank."""
    if pp == 1:
        return (RankLayers(model.num_moe_layers, model.num_hidden_layers - model.num_moe_layers, True, True),)
    moe, dense = [0] * pp, [0] * pp
    for chunk, layers in enumerate(stage_layers(model, pp, chunks, schedule)):
        owner = stage_owner(chunk, pp, schedule)
        for layer in layers:
            (moe if model.is_moe_layer(layer) else dense)[owner] += 1
    last = stage_owner(pp * chunks - 1, pp, schedule)
    return tuple(RankLayers(moe[r], dense[r], r == 0, r == last) for r in range(pp))


def bubble(schedule: str, chunks: int, forward: list[float], backward: list[float], weight: list[float]) -> float:
    """Returns the seconds that the slowest rank of the pipeline waits in a step.

    Args:
        schedule: Name of the schedule.
        chunks: Number of chunks per rank.
        forward: F of every rank, seconds per micro-batch.
        backward: B of every rank.
        weight: W of every rank.

    Raises:
        InputError: For a schedule that is not known.
    """
    totals = [f + b for f, b in zip(forward, backward, strict=True)]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    others = sum(totals) - totals[slowest]
    filled = sum(weight) - weight[slowest]
    match schedule:
        case "gpipe" | "1f1b":
            return others
        case "interleaved_1f1b":
            return others / chunks
        case "interleaved_zero_bubble":
            return max(0.0, others - 2 * filled) / chunks
        case "zbv" | "dualpipev":
            return max(0.0, others - 3 * filled) / 2
    raise _unknown(schedule)


def chunks_in_flight(schedule: str, pp: int, chunks: int, microbatches: int, rank: int) -> float:
    """Returns how many model chunks' activations ``rank`` holds at most; ``chunks`` of them are one micro-batch.

    Raises:
        InputError: For a schedule that is not known.
    """
    if pp == 1:
        return chunks
    match schedule:
        case "gpipe":
            return microbatches * chunks
        case "1f1b":
            return min(microbatches, pp - rank)
        case "interleaved_1f1b" | "interleaved_zero_bubble":
            return min(microbatches * chunks, 2 * (pp - rank - 1) + (chunks - 1) * pp + 1)
        case "zbv" | "dualpipev":
            return min(microbatches * 2, 2 * pp + (schedule == "dualpipev"))
    raise _unknown(schedule)


def _unknown(schedule: str) -> InputError:
    return InputError(f"the planner has no formulas for pipeline_schedule={schedule!r}; use {' or '.join(SCHEDULES)}.")


@lru_cache(maxsize=65536)
def legal(
    schedule: str, pp: int, chunks: int, microbatches: int, model: MoEConfig, sharding: str, recompute: str = "none"
) -> str | None:
    """Returns why the strategy cannot run a schedule, or why it is not planned; None if there is no reason."""
    if pp == 1:
        return None if schedule == "1f1b" and chunks == 1 else "there is no pipeline at pp=1"
    if schedule in V_SHAPED and chunks != 2:
        return f"{schedule} has two chunks a rank, not {chunks}"
    if schedule.startswith("interleaved") and microbatches % pp:
        return f"{schedule} needs micro-batches ({microbatches}) in multiples of pp={pp}"
    if pp * chunks > model.num_hidden_layers:
        return f"{pp} x {chunks} chunks are more than the {model.num_hidden_layers} layers"
    if schedule in V_SHAPED and model.tie_word_embeddings:
        return f"{schedule} does not go with tied embeddings"
    try:
        PipelinePlan(schedule, chunks).check(pp, microbatches, sharding, parse_recompute(recompute))
    except ValueError as error:
        return str(error).rstrip(".")
    return None
