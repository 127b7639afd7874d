# SPDX-License-Identifier: Apache-2.0
"""Predicts the load of the busiest rank and the time of the token exchange, by dispatcher. Pure Python.

Legend: as in ``layer.py``.
"""

from __future__ import annotations

from lightning_moefold.fold import expert_nodes
from lightning_moefold.planner.cost.pairs import Pairs, pairs_of
from lightning_moefold.planner.machine.links import GroupShape, Links, group_shape
from lightning_moefold.planner.search.job import Job


class ExchangeCosts:
    """Computes what it takes to bring tokens to their experts and back.

    Args:
        job: The training job; its routing profile decides the load of the busiest rank.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.model = job, job.model
        self.links = Links(job.hardware)

    def load(self, ep: int, spread: int = 1) -> float:
        """Returns the rows on the busiest rank divided by the balanced number without drops.

        With padding, every rank sends each expert as many rows as the expert may serve, so all ranks are equally busy.
        A row is cut over ``spread`` = tp x cp ranks, and all its tokens that chose an expert may lie on one of them. So
        each of these ranks sends the full number, unless it has fewer tokens.
        """
        model, job = self.model, self.job
        if job.pad_to_capacity and job.capacity_factor is not None:
            parts = spread if job.drop_scope == "full_sequence" else 1
            return min(parts * job.capacity_factor, model.num_experts / model.num_experts_per_tok)
        return job.routing.load_factor(model.num_experts, model.num_experts_per_tok, ep, job.capacity_factor)

    def pairs(self, places: int) -> Pairs:
        """Returns the expected pairs of a token and a place (a rank of ep, or a node) that holds some of its experts."""
        model, job = self.model, self.job
        return pairs_of(job.routing, model.num_experts, model.num_experts_per_tok, places, job.capacity_factor)

    def nodes(self, ep: int, etp: int, dispatcher: str) -> int:
        """Returns the number of nodes between which tokens travel in a first step; 1 if tokens travel in a single step."""
        return expert_nodes(ep, etp, self.job.hardware.gpus_per_node) if dispatcher == "hierarchical" else 1

    def shape(self, size: int, stride: int) -> GroupShape:
        """Returns how a group lies on the nodes."""
        return group_shape(size, stride, self.job.hardware.gpus_per_node)

    def chunks(self, ep: int) -> int:
        """Returns the number of parts of the token exchange; at most the number of experts per rank."""
        return min(self.job.dispatch_chunks, self.model.num_experts // ep) if ep > 1 else 1

    def exchange_costs(
        self, ep: int, etp: int, tokens: int, load: float, dispatcher: str, experts: float
    ) -> tuple[dict[str, float], dict[str, float], float]:
        """Returns the communication's seconds, forward and backward, and how many numbers are moved in memory to sort tokens.

        With C parts, sending the first part and returning the last one is exposed. The other transfers overlap with (C
        - 1) / C of the experts' products, which take twice as long in backward; only what does not fit is exposed.
        Every part costs a message's latency. Parts are cut between experts, so each product is as large as with one
        part.

        Args:
            ep: Ranks among which tokens are exchanged.
            etp: Ranks that share an expert.
            tokens: Number of tokens of this rank, T.
            load: Load of the busiest rank.
            dispatcher: Name of the dispatcher.
            experts: Seconds of the experts' products, forward.
        """
        model, b = self.model, self.job.activation_bytes
        d, chosen = model.hidden_size, tokens * model.num_experts_per_tok
        rows = chosen * load * etp
        sent = chosen * (load if self.job.pad_to_capacity else 1.0)
        if dispatcher == "allgather":
            everyone = tokens * ep * etp
            both = self.links.reduce(self.shape(ep * etp, 1), everyone * d * b)
            return {"a2a": both}, {"a2a": both}, d * (2 * rows + rows + everyone)
        sort = 4 * rows * d if model.num_experts // ep > 1 or etp > 1 else 0.0
        if dispatcher != "alltoall":
            there, back, moved = self._once_to_each(ep, etp, tokens, self.nodes(ep, etp, dispatcher))
            return there, back, d * moved + sort
        parts = self.chunks(ep)
        message = self.links.exchange(self.shape(ep, etp), chosen * load * d * b / parts)
        seen, behind = 2 * message, 2 * (parts - 1) * message
        ways = [seen + self.links.hidden(behind, (parts - 1) / parts * window) for window in (experts, 2 * experts)]
        widen = self.links.gather(self.shape(etp, 1), chosen * load * etp * d * b / parts)
        there, back = ({"a2a": way, "etp": 2 * parts * widen} for way in ways)
        return there, back, 2 * (tokens + sent) * d + sort

    def _once_to_each(
        self, ep: int, etp: int, tokens: int, nodes: int
    ) -> tuple[dict[str, float], dict[str, float], float]:
        """Returns seconds, forward and backward, of a deduplicated exchange, and the rows that it moves in memory.

        A token travels once to each rank that holds some of its experts; with several nodes, once to each node and from there
        to its ranks. The second step adds the collectives that `docs/dispatch.md` counts: its tokens there and back,
        the sizes, and the choices, whose gradients return in backward. (The sizes and choices of the first step are
        ignored for every dispatcher.)

        Args:
            ep: Ranks among which tokens are exchanged.
            etp: Ranks that share an expert.
            tokens: Number of tokens of this rank, T.
            nodes: Number of nodes of ep if the exchange has two steps; 1 if it has one.
        """
        ranks, row = self.pairs(ep), self.model.hidden_size * self.job.activation_bytes
        inside = self.shape(ep // nodes, etp)
        way = self.links.exchange(inside, tokens * ranks.busiest * row)
        widen = 2 * self.links.gather(self.shape(etp, 1), tokens * ranks.busiest * etp * row)
        forward, backward = 2 * way, 2 * way
        moved = 2 * tokens * (1 + ranks.mean)
        if nodes > 1:
            pairs, small = self.pairs(nodes), self.links.empty(inside)
            between = self.links.exchange(
                self.shape(nodes, self.job.hardware.gpus_per_node), tokens * pairs.busiest * row
            )
            forward, backward = forward + 2 * between + 2 * small, backward + 2 * between + small
            # The rows that reach the busiest node are passed on to its ranks, and return.
            moved = 2 * tokens * (1 + pairs.mean) + 2 * tokens * pairs.busiest * (1 + ranks.mean / pairs.mean)
        return {"a2a": forward, "etp": widen}, {"a2a": backward, "etp": widen}, moved
