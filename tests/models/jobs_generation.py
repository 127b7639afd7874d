# SPDX-License-Identifier: Apache-2.0
"""Jobs that generate text under a fold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import MoECausalLM
from lightning_moefold.modules.attention.kv_cache import KeyValueCache
from tests.models.jobs_hugging_face import parallel


def _make(path: str, fold: str, **options: Any) -> MoECausalLM:
    torch.set_default_dtype(torch.float64)
    return parallel(fold, lambda: MoECausalLM.from_pretrained(path, output_router_logits=True), **options)


def deal(rows: Tensor, model: MoECausalLM) -> Tensor:
    """This data rank's rows."""
    place, size = model.batch_axes().data_rank
    return rows[place::size]


def generate(path: str, fold: str, prompts: list[list[Tensor]], runs: list[dict[str, Any]], mode: str) -> list[Any]:
    """``prompts[i]`` are given to the i-th data rank in turn, or dealt to all where there is one list only."""
    model = _make(path, fold, mode=mode)
    model.train()
    place, _ = model.batch_axes().data_rank
    texts = []
    for options in runs:
        ids, mask = prompts[0] if len(prompts) == 1 else prompts[place]
        if len(prompts) == 1:
            ids, mask = deal(ids, model), deal(mask, model)
        texts.append(model.generate(ids, mask, **options))
    assert all(module.training for module in model.modules())
    assert not any(layer.load_E.any() for layer in model.moe_layers().values())
    assert all(p.shape == model.layouts[name].shape for name, p in model.named_parameters())  # let go of
    return texts


def stepwise(path: str, fold: str, token_BS: Tensor, mask_BS: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Logits after the prompt and after each further token: with the cache, and of whole rows."""
    model = _make(path, fold)
    cache = KeyValueCache(mask_BS[:, :prompt], token_BS.shape[1])
    position_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        parts = [model(token_BS[:, :prompt], None, mask_BS[:, :prompt], position_BS[:, :prompt], cache=cache).logits]
        for step in range(prompt, token_BS.shape[1]):
            here = slice(step, step + 1)
            parts.append(model(token_BS[:, here], position_ids=position_BS[:, here], cache=cache).logits)
        whole = model(token_BS, None, mask_BS, position_BS, gather_logits=True).logits
    return torch.cat(parts, 1), whole[:, prompt - 1 :]


def errors(path: str, fold: str, runs: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, str]:
    """Each run's prompts are given to the first data rank; the others have good ones."""
    from tests.strategy.jobs_bad_input import told

    model = _make(path, fold)
    good = torch.tensor([[1, 2, 3]])
    guilty = model.batch_axes().data_rank[0] == 0
    seen = {}
    for name, (prompts, options) in runs.items():
        arguments = (*prompts, options) if guilty else (good, None, {})
        seen[name] = told(lambda a=arguments: model.generate(a[0], a[1], **{"max_new_tokens": 4, **a[2]}))
    seen["good again"] = told(lambda: model.generate(good, max_new_tokens=3 + dist.get_rank() % 1))
    return seen
