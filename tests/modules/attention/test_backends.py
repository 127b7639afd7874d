# SPDX-License-Identifier: Apache-2.0
"""Which of PyTorch's attention kernels each call allows; which one of them runs is PyTorch's choice, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_moefold import MoECausalLM
from lightning_moefold.modules import Attention
from lightning_moefold.modules.attention.backends import without_cudnn
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.testing import make_checkpoint

CUDNN = SDPBackend.CUDNN_ATTENTION
OTHERS = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}


class Call(NamedTuple):
    """One call of ``scaled_dot_product_attention``."""

    allowed: set[SDPBackend]
    queries: int
    masked: bool
    causal: bool


def allowed() -> set[SDPBackend]:
    cuda = torch.backends.cuda
    enabled = {
        CUDNN: cuda.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    return {backend for backend, on in enabled.items() if on}


@contextmanager
def recorded() -> Iterator[list[Call]]:
    calls: list[Call] = []
    plain = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        calls.append(Call(allowed(), q.shape[2], attn_mask is not None, options.get("is_causal", False)))
        return plain(q, k, v, attn_mask=attn_mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", watched):
        yield calls


@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_a_mask_allow_every_kernel(causal: bool) -> None:
    with recorded() as calls:
        Attention(32, 4, 2, causal=causal)(torch.randn(2, 6, 32)).sum().backward()
    assert calls == [Call({CUDNN, *OTHERS}, 6, masked=False, causal=causal)]


@pytest.mark.parametrize("kind", ["window", "left", "documents"])
def test_no_plan_is_made_for_a_mask(kind: str) -> None:
    batch = SequenceBatch(2, 6)
    if kind == "left":
        batch.real_BS = torch.arange(6).expand(2, -1) > 1
    elif kind == "documents":
        batch.document_BS = torch.arange(6).expand(2, -1) // 3
    with recorded() as calls:
        Attention(32, 4, 2, sliding_window=3 if kind == "window" else None)(torch.randn(12, 32), batch)
    assert calls == [Call(OTHERS, 6, masked=True, causal=False)]
    assert CUDNN in allowed()


@pytest.mark.parametrize("padded", [False, True])
def test_no_plan_is_made_for_a_token(padded: bool, tmp_path: Path) -> None:
    """Neither for the prompt nor for any of the tokens after it; and without padding no mask, so that flash kernels apply."""
    model = MoECausalLM.from_pretrained(make_checkpoint(tmp_path / "c", "mixtral", num_hidden_layers=1))
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 0] = not padded
    with recorded() as calls:
        model.generate(torch.ones(2, 5, dtype=torch.int64), mask, max_new_tokens=3, eos_token_id=())
    first, *others = calls
    assert first == Call(OTHERS, 5, masked=padded, causal=not padded)
    assert others == [Call(OTHERS, 1, masked=padded, causal=False)] * 2
    assert CUDNN in allowed()


@pytest.mark.parametrize("chosen", [[CUDNN], [CUDNN, SDPBackend.MATH], [SDPBackend.EFFICIENT_ATTENTION]])
def test_what_the_user_allows_stays(chosen: list[SDPBackend]) -> None:
    """Kernels that the user has excluded are not allowed again, and there is always one."""
    with sdpa_kernel(chosen):
        with without_cudnn():
            assert allowed() == (set(chosen) - {CUDNN} or {CUDNN})
        assert allowed() == set(chosen)
