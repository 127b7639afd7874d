# SPDX-License-Identifier: Apache-2.0
"""Prompts as text, and their continuations as text, under any fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold.models.generation import StopStrings

if TYPE_CHECKING:
    from lightning_moefold.models.causal_lm import MoECausalLM


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pads rows of token ids on the left; returns ``input_ids`` and ``attention_mask``, each ``[B, S]``."""
    length = max((len(row) for row in rows), default=0)
    ids_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for i, row in enumerate(rows):
        ids_BS[i, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask_BS[i, length - len(row) :] = 1
    return ids_BS, mask_BS


def continue_texts(
    model: MoECausalLM,
    prompts: Sequence[str],
    load_tokenizer: Callable[[], Any],
    *,
    special_tokens: bool = True,
    stop_strings: Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """Returns the continuation of each prompt, on every rank. Collective: all ranks pass the same prompts.

    Args:
        model: The model.
        prompts: The prompts; they are dealt to the data ranks in turn.
        load_tokenizer: Returns the tokenizer; called on ranks that have prompts.
        special_tokens: Whether the tokenizer adds its special tokens, such as the one that begins a text.
        stop_strings: Strings that end a text, special tokens among them; they are not part of it.
        **options: Arguments of :meth:`.causal_lm.MoECausalLM.generate`.
    """
    place, size = model.batch_axes().data_rank
    mine, device = prompts[place::size], next(model.parameters()).device
    with model.unequal_calls():  # so that the others learn of a rank that fails to load its tokenizer
        tokenizer = load_tokenizer() if mine else None
        rows: list[list[int]] = []
        if tokenizer is not None:
            plain = {} if special_tokens else {"add_special_tokens": False}
            rows = [list(tokenizer(text, **plain)["input_ids"]) for text in mine]
        ids_BS, mask_BS = (x.to(device) for x in pad_left(rows))
        tokens = model.generate(ids_BS, mask_BS, stop_strings=stop_strings, tokenizer=tokenizer, **options)
    new, stop = tokens[:, ids_BS.shape[1] :].tolist(), StopStrings(tuple(stop_strings), tokenizer)
    texts = [] if tokenizer is None else [stop.cut(row) for row in new]
    found = {place: texts}
    if size > 1:
        everyone: list[tuple[int, list[str]]] = [(0, [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (place, texts))  # over the world, whose group carries objects
        found = dict(everyone)
    return [found[i % size][i // size] for i in range(len(prompts))]
