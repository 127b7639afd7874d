# SPDX-License-Identifier: Apache-2.0
"""What rows, copies and moves of experts cost, as integers that are the same on every rank. Pure Python.

A plan is made by every rank for itself, so nothing that a rank measures may enter it: :class:`BalanceCosts` holds whole
picoseconds and bytes, made once (:meth:`BalanceCosts.of`) from the planner's machine model and sent to all.

Times are of one pass of one layer, forward and backward. An expert with n rows takes ``product + n * row``: the machine
model's product of n rows costs in proportion to ``n + half``, so that the constant part is what many small products lose.
A copy costs its weights out and its gradients back, over the link that its pair of ranks crosses; it pays where it takes more
than ``copy / row`` rows off the busiest rank (:attr:`BalanceCosts.break_even_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil

from lightning_moefold.errors import InputError
from lightning_moefold.planner.machine.hardware import Hardware
from lightning_moefold.planner.machine.kernels import Compute

_PICO = 1e12
#: Part of a layer's time that a move must gain, unless the user says otherwise; that with which policies were compared.
MARGIN = 0.015
#: FLOP/s that a rank computes and bytes/s that it sends where nothing has been measured, by kind of device.
_ASSUMED = {"cpu": (50e9, 1e9), "cuda": (400e12, 50e9)}
#: Products of a gated expert, forward; backward takes two for each.
_PRODUCTS, _BACKWARD = 3, 2
#: Times that a row travels: there and back, forward and backward.
_TRIPS = 4


@dataclass(frozen=True)
class BalanceCosts:
    """Constants of one layer's experts on one machine.

    Args:
        row_ps: Picoseconds of a row in an expert: products, activation, and its four trips between ranks.
        product_ps: Picoseconds that an expert with any row costs besides.
        near_copy_ps: Picoseconds of a copy between ranks of one node: weights out, gradients back.
        far_copy_ps: The same between nodes.
        exchange_ps: Picoseconds that a pass with any copy pays once.
        near_move_ps: Picoseconds in which an expert moves for good within a node, with all its optimizer's state.
        far_move_ps: The same between nodes.
        copy_bytes: Bytes that a copy sends, both ways together.
        move_bytes: Bytes that a move sends.
        parts_per_node: Neighbouring ranks of an expert group that share a node.
        passes: Passes of a layer in one optimizer step (micro-batches).
        pass_rows: Rows of a pass of a layer on all ranks of an expert group, to which past loads are scaled; 0 where these are
            loads of a pass already.
        horizon: Optimizer steps over which a move must pay for itself.
        margin_ppm: Part of a layer's time that a move must gain at least, in millionths.

    Raises:
        InputError: If a value is negative, or one that divides is zero.
    """

    row_ps: int
    product_ps: int
    near_copy_ps: int
    far_copy_ps: int
    exchange_ps: int
    near_move_ps: int
    far_move_ps: int
    copy_bytes: int
    move_bytes: int
    parts_per_node: int
    passes: int = 1
    pass_rows: int = 0
    horizon: int = 1000
    margin_ppm: int = round(MARGIN * 1_000_000)

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name in ("row_ps", "parts_per_node", "passes"))
            if not isinstance(value, int) or value < least:
                raise InputError(
                    f"{field.name}={value!r} of the balance costs must be a whole number of at least {least}."
                )

    @classmethod
    def of(
        cls,
        hardware: Hardware,
        hidden_size: int,
        expert_width: int,
        *,
        parts: int,
        etp: int = 1,
        edp: int = 1,
        dtype: str = "bf16",
        state_bytes: int = 12,
    ) -> BalanceCosts:
        """The constants of a machine.

        Args:
            hardware: Preset or calibrated machine of the planner.
            hidden_size: D.
            expert_width: Width of an expert, before etp cuts it.
            parts: Ranks of ep.
            etp: Ranks that share an expert; ranks of ep lie at this distance.
            edp: Replicas of the experts, over which parameters and states are cut.
            dtype: Of products, and of copies and their gradients.
            state_bytes: Bytes of a parameter with its optimizer's state: 12 for float32 weights under Adam.
        """
        width = {"fp64": 8, "fp32": 4}.get(dtype, 2)
        ffn = ceil(expert_width / etp)
        compute, kernels = Compute(hardware, dtype, width), hardware.kernels
        parameters = _PRODUCTS * hidden_size * ffn
        large = 1 << 20
        whole, part = (_expert_seconds(compute, rows, hidden_size, ffn) for rows in (2 * large, large))
        row = (whole - part) / large
        streamed = (1 + _BACKWARD) * compute.stream(width * parameters)
        per_node = max(1, hardware.gpus_per_node // etp)
        crosses = parts > per_node
        reach = kernels.alltoall_efficiency
        away = max(parts - (per_node if crosses else 1), 0) / parts
        slowest = hardware.inter if crosses else hardware.intra
        travel = _TRIPS * away * etp * width * hidden_size / (slowest.rate * reach)
        sent, state = 2 * width * parameters, ceil(state_bytes * parameters / edp)

        def seconds(num_bytes: float, far: bool) -> int:
            return round(_PICO * num_bytes / ((hardware.inter if far else hardware.intra).rate * reach))

        return cls(
            row_ps=max(1, round(_PICO * (row + travel))),
            product_ps=round(_PICO * max(part - row * large, streamed)),
            near_copy_ps=seconds(sent, False),
            far_copy_ps=seconds(sent, True),
            exchange_ps=round(_PICO * 2 * (kernels.collective + slowest.latency)),
            near_move_ps=seconds(state, False),
            far_move_ps=seconds(state, True),
            copy_bytes=sent,
            move_bytes=state,
            parts_per_node=per_node,
        )

    @classmethod
    def assumed(
        cls,
        device_type: str,
        weights: int,
        *,
        parts: int,
        byte_ps: int | None = None,
        move_bytes: int = 0,
        passes: int = 1,
    ) -> BalanceCosts:
        """The constants of a device about which nothing but its kind is known, on ranks that are all alike.

        Args:
            device_type: ``"cpu"`` or ``"cuda"``.
            weights: Numbers of an expert with which a rank computes.
            parts: Ranks of ep.
            byte_ps: Picoseconds in which a byte travels; by default that of the kind of device.
            move_bytes: Bytes that move with an expert, with all its optimizer's state.
            passes: Passes of a layer in one optimizer step.
        """
        flops, rate = _ASSUMED.get(device_type, _ASSUMED["cuda"])
        byte_ps = byte_ps or round(_PICO / rate)
        sent = 2 * weights * 2  # weights out and gradients back, in 16 bits
        # 6 FLOPs a row for each weight: forward, and the two products of backward.
        return cls(
            row_ps=max(1, round(6 * weights / flops * _PICO)), product_ps=0, near_copy_ps=sent * byte_ps,
            far_copy_ps=sent * byte_ps, exchange_ps=0, near_move_ps=move_bytes * byte_ps, far_move_ps=move_bytes * byte_ps,
            copy_bytes=sent, move_bytes=move_bytes, parts_per_node=parts, passes=passes,
        )  # fmt: skip

    @property
    def break_even_rows(self) -> int:
        """Rows that a copy within a node must take off the busiest rank to be worth its bytes."""
        return -(-self.near_copy_ps // self.row_ps)

    def known_early(self) -> BalanceCosts:
        """Prices of copies that are known before the pass: weights travel while something else runs, gradients still return."""
        return replace(self, near_copy_ps=self.near_copy_ps // 2, far_copy_ps=self.far_copy_ps // 2)

    def node(self, part: int) -> int:
        """Node of a rank of ep."""
        return part // self.parts_per_node

    def copy_ps(self, owner: int, helper: int) -> int:
        """Picoseconds of a copy between two ranks of ep."""
        return self.near_copy_ps if self.node(owner) == self.node(helper) else self.far_copy_ps

    def move_ps(self, old: Sequence[int], new: Sequence[int], parts: int) -> int:
        """Picoseconds of moves that are made together: those of the rank that sends or receives most.

        Args:
            old: Rank of each expert before.
            new: Rank of each expert after.
            parts: Ranks of ep.
        """
        out, into = [0] * parts, [0] * parts
        for before, after in zip(old, new, strict=True):
            if before != after:
                price = self.near_move_ps if self.node(before) == self.node(after) else self.far_move_ps
                out[before] += price
                into[after] += price
        return max(*out, *into)


def _expert_seconds(compute: Compute, rows: int, hidden: int, ffn: int) -> float:
    """Products and activation of a gated expert, forward and backward."""
    product = 2 * compute.gemm(rows, ffn, hidden) + compute.gemm(rows, hidden, ffn)
    return (1 + _BACKWARD) * product + 2.5 * compute.stream(compute.width * _PRODUCTS * rows * ffn)
