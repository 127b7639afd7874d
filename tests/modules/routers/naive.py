# SPDX-License-Identifier: Apache-2.0
"""The oracle: a router that decides token by token in plain loops, inside Hugging Face's modelling code in one process.

It shares nothing with the package but the names of the options: the noise comes from Python integers, groups and top-k from
sorted lists, losses from sums over lists of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_moefold.testing import Batch, hf_reference
from lightning_moefold.testing.oracle import _hand_over_gradients, _label_weight, _loss, _view_parameters

_WORD = (1 << 64) - 1


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def noise(size: int, *coordinates: int) -> list[float]:
    """``size`` numbers in [0, 1) for a token."""
    key, step = 0, 0x9E3779B97F4A7C15
    for coordinate in coordinates:
        key = _mix((key + step + coordinate) & _WORD)
    return [(_mix((key + (i + 1) * step) & _WORD) >> 40) / 2**24 for i in range(size)]


@dataclass
class Token:
    """What the router has decided for one token."""

    weights: Tensor
    experts: list[int]
    probability: Tensor
    z: Tensor


@dataclass
class Place:
    """Where a token lies."""

    microbatch: int
    row: int
    position: int
    counts: bool


@dataclass
class Scored:
    """What the router thinks of one token before it decides."""

    logits: Tensor
    scores: list[Tensor]
    choice: list[float]


def score(x_D: Tensor, weight_ED: Tensor, options: dict[str, Any], bias: list[float], place: Place, call: int,
          layer: int) -> Scored:  # fmt: skip
    """Scores of one token, and by what its experts are compared."""
    if jitter := options.get("input_jitter", 0.0):
        numbers = noise(len(x_D), options.get("seed", 0), call, layer, place.row, place.position)
        x_D = x_D * torch.tensor([1 + jitter * (2 * u - 1) for u in numbers], dtype=x_D.dtype)
    logits = weight_ED @ x_D
    kind, name = options.get("score_function", "softmax"), options.get("name", "top_k")
    exponents = [torch.exp(v - logits.max().detach()) for v in logits / (2.0 if name == "tempered" else 1.0)]
    scores = [e / sum(exponents) for e in exponents] if kind == "softmax" else [1 / (1 + torch.exp(-v)) for v in logits]
    return Scored(logits, scores, [float(s.detach()) + b for s, b in zip(scores, bias, strict=True)])


def choose(choice: list[float], k: int, options: dict[str, Any], place: Place) -> list[int]:
    """One token's experts, where it does not depend on other tokens."""
    experts = len(choice)
    if options.get("name") == "force_balanced":
        return [(place.position * k + place.row + i) % experts for i in range(k)]
    groups = options.get("n_group", 1)
    size = experts // groups
    allowed = list(range(experts))
    if groups > 1:
        best = options.get("group_score_topk", 2)
        worth = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        open_groups = sorted(range(groups), key=lambda g: -worth[g])[: options.get("topk_group", 1)]
        allowed = [e for e in allowed if e // size in open_groups]
    return sorted(allowed, key=lambda e: -choice[e])[:k]


def coarse(x: float) -> float:
    """By what tokens are compared: 26 binary digits, so that those that are alike but for rounding are equal."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**26), exponent - 26)


def swipe(choices: list[list[float]], k: int) -> list[list[int]]:
    """Experts of the tokens of one row, in the order of positions, evenly dealt."""
    if not choices:
        return []
    tokens, experts = len(choices), len(choices[0])
    has: list[list[int]] = [[] for _ in choices]
    taken = [0] * experts
    for number in range(1, k + 1):
        limit = math.ceil(number * tokens / experts)
        waiting = set(range(tokens))
        while True:
            asked: dict[int, list[int]] = {}
            for t in waiting:
                free = [e for e in range(experts) if taken[e] < limit and e not in has[t]]
                if free:
                    asked.setdefault(max(free, key=lambda e, t=t: (choices[t][e], -e)), []).append(t)
            if not asked:
                break
            for e, askers in asked.items():
                askers.sort(key=lambda t, e=e: (-coarse(choices[t][e]), t))
                for t in askers[: limit - taken[e]]:
                    has[t].append(e)
                    waiting.remove(t)
                taken[e] = min(limit, taken[e] + len(askers))
        for t in sorted(waiting):
            free = next(e for e in range(experts) if taken[e] < limit)
            giver = max((u for u in range(tokens) if free not in has[u]), key=lambda u: (coarse(choices[u][free]), -u))
            given = max((e for e in has[giver] if e not in has[t]), key=lambda e: (choices[t][e], -e))
            has[giver][has[giver].index(given)] = free
            has[t].append(given)
            taken[free] += 1
    return has


def topology_aware(choices: list[list[float]], k: int, row: int, options: dict[str, Any]) -> list[list[int]]:
    """Experts of the tokens of one row, in the order of positions, few of them on another node than the row."""
    if not choices:
        return []
    nodes = options["nodes"]
    ranks = options.get("data_ranks") or nodes
    home = (row % ranks) // (ranks // nodes)
    experts = len(choices[0])
    near = [e for e in range(experts) if e // (experts // nodes) == home]
    best = [sorted(range(experts), key=lambda e, c=c: (-c[e], e))[:k] for c in choices]
    far = [(t, j) for t, chosen in enumerate(best) for j, e in enumerate(chosen) if e not in near]
    far.sort(key=lambda place: (-coarse(choices[place[0]][best[place[0]][place[1]]]), place))
    budget = math.floor(options.get("far_fraction", 0.14) * k * len(choices))
    for t, j in far[budget:]:
        best[t][j] = -1
    for t, chosen in enumerate(best):
        others = sorted((e for e in near if e not in chosen), key=lambda e, t=t: (-choices[t][e], e))
        best[t] = [e if e >= 0 else others.pop(0) for e in chosen]
    return best


def weigh(scored: Scored, chosen: list[int], options: dict[str, Any], norm: bool) -> Token:
    """What becomes of one token's choice."""
    logits, scores = scored.logits, scored.scores
    if options.get("softmax_after_topk"):
        kept = [torch.exp(logits[e] - logits.max().detach()) for e in chosen]
        weights = [v / sum(kept) for v in kept]
    else:
        weights = [scores[e] for e in chosen]
        if options.get("norm_topk_prob", norm):
            weights = [w / sum(weights) for w in weights]
    scale = options.get("routed_scaling_factor", 1.0)
    probability = torch.stack(scores)
    return Token(
        torch.stack([w * scale for w in weights]), chosen, probability / probability.sum(), logits.logsumexp(0) ** 2
    )


def route(scored: list[Scored], places: list[Place], k: int, options: dict[str, Any], norm: bool) -> list[Token]:
    """Whole rows of tokens."""
    chosen = [choose(s.choice, k, options, place) for s, place in zip(scored, places, strict=True)]
    if (name := options.get("name")) in ("swipe", "topology_aware"):
        for row in {place.row for place in places}:
            members = [i for i, place in enumerate(places) if place.row == row and place.counts]
            choices = [scored[i].choice for i in members]
            dealt = swipe(choices, k) if name == "swipe" else topology_aware(choices, k, row, options)
            for i, experts in zip(members, dealt, strict=True):
                chosen[i] = experts
    return [weigh(s, c, options, norm) for s, c in zip(scored, chosen, strict=True)]


def drop(tokens: list[Token], places: list[Place], factor: float) -> list[list[float]]:
    """1 for each choice that its expert serves, 0 for others: the most probable ones of each row, coarsely, padding left out."""
    k, experts = len(tokens[0].experts), len(tokens[0].probability)
    served = [[0.0] * k for _ in tokens]
    for row in {place.row for place in places}:
        members = [i for i, place in enumerate(places) if place.row == row and place.counts]
        room = min(len(members), math.ceil(factor * k * len(members) / experts))
        for expert in range(experts):
            asking = [i for i in members if expert in tokens[i].experts]
            asking.sort(key=lambda i, e=expert: (-coarse(float(tokens[i].probability[e].detach())), places[i].position))
            for i in asking[:room]:
                served[i][tokens[i].experts.index(expert)] = 1.0
    return served


class NaiveRouters:
    """Stand in for the routers of a Hugging Face model, and remember every token."""

    def __init__(
        self, model: Any, options: dict[str, Any], bias: Tensor | None, capacity_factor: float | None = None
    ) -> None:
        config, self.factor, self.dropped = model.config, capacity_factor, 0
        self.options, self.norm, self.k = options, bool(config.norm_topk_prob), config.num_experts_per_tok
        self.experts, self.call, self.places = config.num_experts, 0, list[Place]()
        self.gates = {i: m.mlp.gate for i, m in enumerate(model.model.layers) if hasattr(m.mlp, "gate")}
        start = [0.0] * self.experts if bias is None else bias.tolist()
        self.bias = {i: list(start) for i in self.gates}
        self.counts = {i: [0] * self.experts for i in self.gates}
        self.seen: dict[int, list[tuple[Place, Token]]] = {i: [] for i in self.gates}
        for index, gate in self.gates.items():
            gate.forward = lambda hidden, index=index, gate=gate: self._forward(index, gate, hidden)

    def _forward(self, index: int, gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        bias = self.bias[index]
        scored = [
            score(x, gate.weight, self.options, bias, place, self.call, index)
            for x, place in zip(rows, self.places, strict=True)
        ]
        tokens = route(scored, self.places, self.k, self.options, self.norm)
        self.seen[index] += list(zip(self.places, tokens, strict=True))
        weights, chosen = torch.stack([t.weights for t in tokens]), torch.tensor([t.experts for t in tokens])
        if self.factor is not None:
            served = torch.tensor(drop(tokens, self.places, self.factor), dtype=weights.dtype)
            self.dropped += sum(place.counts for place in self.places) * self.k - int(served.sum())
            weights = weights * served
        return torch.empty(0), weights, chosen

    def losses(self, kind: str) -> tuple[Tensor, Tensor]:
        """Load-balancing loss and z-loss of what was seen since the last time."""
        if kind == "huggingface":
            groups: dict[Any, list[Token]] = {}
            for seen in self.seen.values():
                _sort(seen, lambda place: place.microbatch, groups)
            aux = self._mean(groups)
        else:
            key = {"microbatch": lambda p: p.microbatch, "sequence": lambda p: p.row, "global_batch": lambda p: 0}[kind]
            aux = sum(self._mean(_sort(seen, key, {})) for seen in self.seen.values()) / len(self.seen)
        z = [token.z for seen in self.seen.values() for place, token in seen if place.counts]
        for index, seen in self.seen.items():
            for place, token in seen:
                for expert in token.experts if place.counts else ():
                    self.counts[index][expert] += 1
            seen.clear()
        return aux, sum(z) / len(z)

    def _mean(self, groups: dict[Any, list[Token]]) -> Tensor:
        losses = []
        for tokens in groups.values():
            share = [sum(t.experts.count(e) for t in tokens) / len(tokens) for e in range(self.experts)]
            losses.append(
                self.experts
                * sum(share[e] * sum(t.probability[e] for t in tokens) for e in range(self.experts))
                / len(tokens)
            )
        return sum(losses) / len(losses)

    def step(self) -> None:
        """After an optimizer step."""
        rate = self.options.get("bias_update_rate") or 0.0
        for index, counts in self.counts.items():
            for expert in range(self.experts):
                difference = sum(counts) - self.experts * counts[expert]
                self.bias[index][expert] += rate * ((difference > 0) - (difference < 0))
            self.counts[index] = [0] * self.experts


def _sort(seen: list[tuple[Place, Token]], key: Any, groups: dict[Any, list[Token]]) -> dict[Any, list[Token]]:
    for place, token in seen:
        if place.counts:
            groups.setdefault(key(place), []).append(token)
    return groups


@dataclass
class NaiveRun:
    """What one process saw."""

    losses: list[float] = field(default_factory=list)
    aux: list[float] = field(default_factory=list)
    z: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor | None]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[int, list[float]] = field(default_factory=dict)
    counts: list[dict[int, list[int]]] = field(default_factory=list)
    dropped: int = 0


def train_alone(path: str, batches: Sequence[Sequence[Batch]], spec: dict[str, Any]) -> NaiveRun:
    """Trains on ``batches[step][data rank]`` in one process, as :func:`tests.modules.routers.jobs_folds.train` does on ranks."""
    overrides = spec["overrides"]
    model = hf_reference(path).train()
    parameters = _view_parameters(model, ())
    factor = spec.get("dispatch", {}).get("capacity_factor")
    naive = NaiveRouters(model, overrides.get("router", {}), spec.get("bias"), factor)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    kind, m, every = overrides.get("aux_loss", "huggingface"), spec["num_microbatches"], spec["accumulate"]
    wanted = kind != "huggingface" or overrides.get("output_router_logits", False)
    run = NaiveRun()
    for index, step in enumerate(batches):
        language = _language_loss(model, naive, step, m)
        aux, z = naive.losses(kind)
        loss = language + (0.05 * aux if wanted else 0.0) + overrides.get("router_z_loss_coef", 0.0) * z
        (loss / every).backward()
        naive.call += 1
        run.losses.append(float(loss.detach()))
        run.aux.append(float(aux.detach()) if wanted else math.nan)
        run.z.append(float(z.detach()))
        if (index + 1) % every:
            continue
        _hand_over_gradients(model, parameters)
        run.grads.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        run.counts.append({i: list(counts) for i, counts in naive.counts.items()})
        optimizer.step()
        naive.step()
        model.zero_grad()
    run.weights = {n: p.detach().clone() for n, p in parameters.items()}
    run.bias, run.dropped = naive.bias, naive.dropped
    return run


def _language_loss(model: Any, naive: NaiveRouters, step: Sequence[Batch], m: int) -> Tensor:
    tokens = sum(_label_weight(batch) for batch in step) or 1
    blocks = [{key: value.tensor_split(m) for key, value in batch.items()} for batch in step]
    numbers = [torch.arange(len(batch["input_ids"])).tensor_split(m) for batch in step]
    total = torch.zeros((), dtype=torch.float64)
    for j in range(m):
        for rank, block in enumerate(blocks):
            part = {key: value[j] for key, value in block.items()}
            if not len(part["input_ids"]):
                continue
            mask = part.get("attention_mask", torch.ones_like(part["input_ids"]))
            naive.places = [
                Place(j, int(b) * len(step) + rank, position, bool(mask[i, position]))
                for i, b in enumerate(numbers[rank][j])
                for position in range(mask.shape[1])
            ]
            total = total + _loss(model, part, tokens)
    return total
