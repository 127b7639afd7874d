# SPDX-License-Identifier: Apache-2.0
"""Text generation: how the next token is chosen, and the loop over tokens.

Legend: B rows, S positions of the prompts, V vocabulary, n new tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.kernels.noise import generator_of
from lightning_moefold.models.batch import check_kinds
from lightning_moefold.models.masks import read_mask
from lightning_moefold.modules.attention.backends import without_cudnn
from lightning_moefold.modules.attention.kv_cache import KeyValueCache
from lightning_moefold.modules.base import wide

if TYPE_CHECKING:
    from lightning_moefold.models.causal_lm import MoECausalLM


# ---- the next token --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Options for drawing tokens; see :meth:`.causal_lm.MoECausalLM.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raises a ValueError if an option is out of range."""
        if not self.temperature > 0:
            raise InputError(
                f"temperature={self.temperature} must be positive; for the most probable token, do not sample."
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1, or None.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must lie above 0 and at most at 1, or be None.")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Returns the probabilities of the next token, ``[B, V]``, after temperature, top-k and top-p."""
        logits_BV = logits_BV.to(wide(logits_BV.dtype)) / self.temperature
        if self.top_k is not None:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ascending_BV, order_BV = logits_BV.sort()
            below_BV = _cumulative(ascending_BV.softmax(-1)) <= 1 - self.top_p
            below_BV[:, -1] = False
            logits_BV = logits_BV.masked_fill(below_BV.scatter(1, order_BV, below_BV), float("-inf"))
        return logits_BV.softmax(-1)


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Returns the token at which the cumulative probability exceeds a uniform number, ``[B]``."""
    sum_BV = _cumulative(probability_BV.double())
    total_B1 = sum_BV[:, -1:]
    token_B = (sum_BV <= uniform_B.unsqueeze(1) * total_B1).sum(-1)
    return token_B.minimum((sum_BV < total_B1).sum(-1))  # rounding may lead past the last token with any probability


def _cumulative(x_BV: Tensor) -> Tensor:
    """Adds up along rows; in a deterministic run on the host, because CUDA's sum of floats is refused there."""
    on_host = x_BV.is_cuda and torch.are_deterministic_algorithms_enabled()
    return x_BV.cpu().cumsum(-1).to(x_BV.device) if on_host else x_BV.cumsum(-1)


def _uniforms(model: MoECausalLM, seed: int | None, rows: int, count: int, device: torch.device) -> Tensor:
    """Draws numbers in [0, 1) for all rows and new tokens, ``[n, B]``; each row has its own generator.

    So a row's text depends neither on the fold nor on the other rows.
    """
    data = model.batch_axes().data_rank
    if seed is None:
        shared = torch.randint(1 << 62, (1,)).to(device)
        for axis in (model.tp,) if model.mesh is None else map(model.mesh.axis, ("tp", "cp", "pp")):
            comm.broadcast_flat([shared], axis)
        seed = int(shared)
    generators = (generator_of(seed, row * data[1] + data[0]) for row in range(rows))
    drawn = [torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(drawn, dim=1).to(device)


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a text, such as a special token's, and the tokenizer that decodes tokens."""

    texts: tuple[str, ...] = ()
    tokenizer: Any = None

    def check(self) -> None:
        """Raises a ValueError if a string is empty, or no tokenizer is there to find them."""
        if "" in self.texts:
            raise InputError("a stop string is empty; leave it out.")
        if self.texts and self.tokenizer is None:
            raise InputError("stop_strings need the tokenizer that decodes the tokens; give tokenizer=... as well.")

    def complete(self, token_Bn: Tensor, wanted_B: Tensor) -> Tensor:
        """Returns which of the wanted rows hold a stop string in their new tokens, ``[B]`` bool."""
        found_B = torch.zeros_like(wanted_B)
        for row in wanted_B.nonzero().flatten().tolist():
            found_B[row] = self._first(self._decode(token_Bn[row].tolist())) is not None
        return found_B

    def cut(self, tokens: list[int]) -> str:
        """Returns the text of new tokens up to the first stop string, without special tokens."""
        whole = self._decode(tokens)
        place = self._first(whole)
        if place is None:
            return self._decode(tokens, skips=True)
        # The tokens that lie before the stop string as a whole; of a letter cut in two, the text is no beginning.
        count, before = 0, ""
        for number in range(1, len(tokens) + 1):
            text = self._decode(tokens[:number])
            if whole.startswith(text):
                if len(text) > place:
                    break
                count, before = number, text
        # A special token that a stop string cuts is left out like a whole one.
        of_cut = whole[len(before) : place] if self._decode(tokens[count : count + 1], skips=True) else ""
        return self._decode(tokens[:count], skips=True) + of_cut

    def _first(self, text: str) -> int | None:
        return min((place for stop in self.texts if (place := text.find(stop)) >= 0), default=None)

    def _decode(self, tokens: list[int], skips: bool = False) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skips))


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _special_tokens(
    model: MoECausalLM, eos: int | Sequence[int] | None, pad: int | None
) -> tuple[list[int], int | None]:
    """Returns the end-of-text tokens and the padding token, by default those of the checkpoint."""
    fields = dict(model.config.raw)
    if model.origin is not None:
        file = model.origin / "generation_config.json"
        fields |= json.loads(file.read_text()) if file.is_file() else {}
    eos = fields.get("eos_token_id") if eos is None else eos
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return ends, fields.get("pad_token_id") if pad is None else pad


def _read_mask(input_ids: Tensor, attention_mask: Tensor | None, ends: list[int], pad: int | None) -> Tensor:
    """Returns which positions of the prompts are not padding, ``[B, S]`` bool.

    Raises:
        ValueError: If the prompts cannot be continued.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise InputError(
            f"input_ids must be integers of shape [rows, length], not {input_ids.dtype} {list(input_ids.shape)}."
        )
    real_BS = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask has shape {list(attention_mask.shape)}, but input_ids has {list(input_ids.shape)}; make them "
                "equal."
            )
        check_kinds({"attention_mask": attention_mask})
        mask, documents = read_mask(attention_mask, None)
        if documents is not None:
            raise InputError(
                "attention_mask numbers documents, but a prompt is one document; give 1 for tokens and 0 for padding."
            )
        real_BS = real_BS if mask is None else mask
    elif pad is not None and pad not in ends:
        real_BS = input_ids != pad
    if not bool(real_BS.any(1).all()):
        raise InputError("a prompt holds no token; give each at least one, such as the one that begins a text.")
    if not bool(real_BS[:, -1].all()):
        raise InputError("prompts are padded on the right; pad them on the left (padding_side='left' of a tokenizer).")
    return real_BS


def _check_lengths(model: MoECausalLM, real_BS: Tensor, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    longest, limit = int(real_BS.sum(1).max()), model.config.raw.get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise InputError(f"a prompt has {longest} tokens, more than max_position_embeddings={limit}; shorten it.")


# ---- the loop --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: MoECausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    stop: StopStrings,
) -> Tensor:
    """See :meth:`.causal_lm.MoECausalLM.generate`; ``sampling`` is None for the most probable token."""
    # Inside the context, so that the other ranks learn of a bad prompt on one rank.
    with _evaluating(model), model.unequal_calls(), without_cudnn():
        if input_ids.dim() == 2 and not input_ids.shape[0]:
            return input_ids
        ends, pad = _special_tokens(model, eos_token_id, pad_token_id)
        real_BS = _read_mask(input_ids, attention_mask, ends, pad)
        _check_lengths(model, real_BS, max_new_tokens)
        stop.check()
        uniform_nB = None
        if sampling is not None:
            sampling.check()
            uniform_nB = _uniforms(model, sampling.seed, len(input_ids), max_new_tokens, input_ids.device)
        pad = ends[0] if pad is None and ends else pad
        end_tokens = torch.tensor(ends, dtype=input_ids.dtype, device=input_ids.device)
        unfinished_B = torch.ones_like(real_BS[:, 0])
        rows, parts = _Rows(model, real_BS, max_new_tokens), [input_ids]
        logits_BV = rows.first(input_ids)
        for step in range(max_new_tokens):
            if sampling is None or uniform_nB is None:
                token_B = logits_BV.argmax(-1)
            else:
                token_B = draw(sampling.probabilities(logits_BV), uniform_nB[step])
            if pad is not None:
                token_B = torch.where(unfinished_B, token_B, pad)
            unfinished_B = unfinished_B & ~torch.isin(token_B, end_tokens)
            parts.append(token_B.to(input_ids.dtype).unsqueeze(1))
            if stop.texts:
                unfinished_B = unfinished_B & ~stop.complete(torch.cat(parts[1:], dim=1), unfinished_B)
            if step + 1 == max_new_tokens or not bool(unfinished_B.any()):
                break
            logits_BV = rows.then(parts[-1])
        return torch.cat(parts, dim=1)


class _Rows:
    """Rows that grow by a token a time.

    Keys and values of earlier positions are kept, except where ranks hold parts of rows, or of the layers of micro-batches: there
    whole rows run again for every token.

    Args:
        model: The model.
        real_BS: False for padding of the prompts.
        count: Maximum number of new tokens.
    """

    def __init__(self, model: MoECausalLM, real_BS: Tensor, count: int) -> None:
        self._model, self._real_BS = model, real_BS
        self._position_BS = (real_BS.cumsum(1) - 1).clamp(min=0)
        whole = model.fold.cp * model.fold.pp > 1
        self._cache = None if whole else KeyValueCache(real_BS, real_BS.shape[1] + count)

    def first(self, token_BS: Tensor) -> Tensor:
        """Returns the logits after the prompts, ``[B, V]``."""
        self._token_BS = token_BS
        return self._logits(token_BS, self._position_BS, self._real_BS)

    def then(self, token_B1: Tensor) -> Tensor:
        """Returns the logits after one more token."""
        next_B1 = self._position_BS[:, -1:] + 1
        if self._cache is not None:
            self._position_BS = next_B1
            return self._logits(token_B1, next_B1)
        self._real_BS = F.pad(self._real_BS, (0, 1), value=True)
        self._position_BS = torch.cat([self._position_BS, next_B1], dim=1)
        return self.first(torch.cat([self._token_BS, token_B1], dim=1))

    def _logits(self, token_BS: Tensor, position_BS: Tensor, real_BS: Tensor | None = None) -> Tensor:
        output = self._model(
            token_BS, attention_mask=real_BS, position_ids=position_BS, last_logits=True, cache=self._cache
        )
        return output.logits[:, -1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode in the context; afterwards every module is in its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
