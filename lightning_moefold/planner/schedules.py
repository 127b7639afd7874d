# SPDX-License-Identifier: Apache-2.0
"""Pipeline schedules: who holds which layers, how long ranks wait, how many micro-batches are in flight. Pure Python.

Times per micro-batch and rank: F forward, B backward in all, W the part of B that computes weight gradients. For p
equal stages, M micro-batches and v chunks a rank, a step takes ``M (F + B) + bubble`` with

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

from lightning_moefold.models.config import MoEConfig
from lightning_moefold.planner.job import SPLIT_BACKWARD, V_SHAPED


@dataclass(frozen=True)
class RankLayers:
    """What one pipeline rank holds.

    Args:
        moe: Layers with experts.
        dense: Layers without.
        first: Whether it holds the embedding.
        last: Whether it holds the final norm and the head.
    """

    moe: int
    dense: int
    first: bool = False
    last: bool = False

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.moe + self.dense


def even_split(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` pieces that differ by one at most, larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def chunk_owner(chunk: int, pp: int, schedule: str) -> int:
    """The pipeline rank of a model chunk: in turns, or there and back for the V-shaped schedules."""
    turn, place = divmod(chunk, pp)
    return pp - 1 - place if schedule in V_SHAPED and turn % 2 else place


@lru_cache(maxsize=4096)
def pipeline_layout(model: MoEConfig, pp: int, chunks: int, schedule: str) -> tuple[RankLayers, ...]:
    """What each of the ``pp`` ranks holds, with ``chunks`` chunks a rank."""
    moe, dense = [0] * pp, [0] * pp
    index = 0
    for chunk, size in enumerate(even_split(model.num_hidden_layers, pp * chunks)):
        owner = chunk_owner(chunk, pp, schedule)
        for layer in range(index, index + size):
            (moe if model.is_moe_layer(layer) else dense)[owner] += 1
        index += size
    last = chunk_owner(pp * chunks - 1, pp, schedule)
    return tuple(RankLayers(moe[r], dense[r], r == 0, r == last) for r in range(pp))


def bubble(schedule: str, chunks: int, forward: list[float], backward: list[float], weight: list[float]) -> float:
    """Seconds that the slowest rank of the pipeline waits in a step.

    Args:
        schedule: Its name.
        chunks: Chunks a rank.
        forward: F of every rank, seconds per micro-batch.
        backward: B of every rank.
        weight: W of every rank.
    """
    totals = [f + b for f, b in zip(forward, backward, strict=True)]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    others = sum(totals) - totals[slowest]
    if schedule in ("gpipe", "1f1b"):
        return others
    if schedule == "interleaved_1f1b":
        return others / chunks
    filled = sum(weight) - weight[slowest]
    if schedule == "interleaved_zero_bubble":
        return max(0.0, others - 2 * filled) / chunks
    return max(0.0, others - 3 * filled) / 2


def chunks_in_flight(schedule: str, pp: int, chunks: int, microbatches: int, rank: int) -> float:
    """Most model chunks of ``rank`` whose activations are held at once; ``chunks`` of them are one micro-batch."""
    if pp == 1:
        return chunks
    if schedule == "gpipe":
        return microbatches * chunks
    if schedule == "1f1b":
        return min(microbatches, pp - rank)
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        return min(microbatches * chunks, 2 * (pp - rank - 1) + (chunks - 1) * pp + 1)
    return min(microbatches * 2, 2 * pp + (schedule == "dualpipev"))


def legal(schedule: str, pp: int, chunks: int, microbatches: int, layers: int, sharding: str) -> str | None:
    """Why a schedule cannot run, or None."""
    if pp == 1:
        return None if schedule == "1f1b" and chunks == 1 else "there is no pipeline at pp=1"
    if schedule in V_SHAPED:
        if chunks != 2:
            return f"{schedule} has two chunks a rank, not {chunks}"
    elif schedule.startswith("interleaved"):
        if chunks < 2:
            return f"{schedule} needs two chunks a rank or more"
        if microbatches % pp:
            return f"{schedule} needs micro-batches ({microbatches}) in multiples of pp={pp}"
    elif chunks != 1:
        return f"{schedule} has one chunk a rank, not {chunks}"
    if pp * chunks > layers:
        return f"{pp} x {chunks} chunks are more than the {layers} layers"
    if schedule in SPLIT_BACKWARD and sharding == "full":
        return f"{schedule} splits backward, which sharding='full' cannot do; use 1f1b or interleaved_1f1b"
    return None
