# SPDX-License-Identifier: Apache-2.0
"""How often the host waits for the device in a forward pass on one rank: each time, the device runs out of work.

Counted by what the code asks for, wherever its tensors are: values that the host reads, results whose size the device
decides, and tensors made from numbers of the host.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_moefold.dispatch import ExpertRows
from lightning_moefold.layout import even_split
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.models.batch import BatchAxes, read_batch
from lightning_moefold.modules import Experts
from lightning_moefold.modules.experts.packed import PackedExperts

_READS = {
    getattr(Tensor, name): name
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")
} | {torch.nonzero: "nonzero", torch.masked_select: "masked_select"}
_MADE = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class Waits(TorchFunctionMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            self.seen[_READS[func]] += 1
        elif func in _MADE and not isinstance(args[-1], Tensor):
            self.seen["from the host"] += 1
        elif func in (torch.repeat_interleave, Tensor.repeat_interleave):
            repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
            self.seen["size"] += isinstance(repeats, Tensor) and kwargs.get("output_size") is None
        return func(*args, **kwargs)


def _config(**more: Any) -> MoEConfig:
    return MoEConfig.from_hf(
        {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 4, "output_router_logits": True, **more}
    )  # fmt: skip


def _tensors(names: tuple[str, ...]) -> dict[str, Tensor]:
    values = {name: torch.ones(4, 6, dtype=torch.int64) for name in ("input_ids", *names)}
    if "attention_mask" in values:
        values["attention_mask"][1, 4:] = 0
    if "document_ids" in values:
        values["document_ids"][:, 3:] = 2
    return values


@pytest.mark.parametrize("names", [("labels",), ("labels", "loss_weights")], ids="-".join)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_forward_pass(names: tuple[str, ...], microbatches: int) -> None:
    """For positions that have a target, and for faults in the data; as often for three layers as for none."""
    model = MoECausalLM(_config()).bfloat16()
    model.num_microbatches = microbatches
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        experts.kernel = "grouped_mm"
    with Waits() as seen:
        loss = model(**_tensors(names)).loss
    assert loss.isfinite()
    assert +seen.seen == {"nonzero": 1, "tolist": 1}


def test_experts_of_uneven_widths() -> None:
    """For the rows of each expert, once for all buckets."""
    experts = PackedExperts(16, [64, 3, 40, 0, 9])
    experts.kernel = "grouped_mm"
    rows = ExpertRows(torch.arange(8), torch.ones(8), torch.tensor([2, 1, 3, 1, 1]), distinct=True)
    x_AD = torch.ones(8, 16, requires_grad=True)
    experts.compute(x_AD, rows, experts.stacks())  # brings to the device where buckets lie
    with Waits() as seen:
        experts.compute(x_AD, rows, experts.stacks()).sum().backward()
    assert +seen.seen == {"tolist": 1}


@pytest.mark.parametrize(
    ("names", "waits"),
    [
        ((), {"nonzero": 1}),
        (("labels",), {"nonzero": 1}),
        (("labels", "attention_mask"), {"nonzero": 1, "tolist": 1, "__bool__": 1, "__int__": 1}),
        (("attention_mask",), {"nonzero": 1, "tolist": 1}),
        (("labels", "document_ids"), {"nonzero": 1, "__bool__": 1}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_reading_a_batch(names: tuple[str, ...], waits: dict[str, int]) -> None:
    """A mask is read, asked whether causality covers its padding, and its tokens counted; documents are looked for once."""
    given = dict.fromkeys(("labels", "attention_mask", "position_ids", "document_ids", "loss_weights"))
    with Waits() as seen:
        read_batch(_config(), BatchAxes(), 2, **{**given, **_tensors(names)}, keep_all=False)
    assert +seen.seen == waits


@pytest.mark.parametrize("groups", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_groups_of_rows(rows: int, groups: int) -> None:
    """Computed on the device, and as ``torch.Tensor.tensor_split`` cuts."""
    ids = torch.ones(rows, 5, dtype=torch.int64)
    none = dict.fromkeys(("labels", "attention_mask", "position_ids", "document_ids", "loss_weights"))
    batch = read_batch(_config(), BatchAxes(), groups, input_ids=ids, keep_all=False, **none)
    expected = [i for i, size in enumerate(even_split(rows, groups)) for _ in range(5 * size)]
    assert batch.sequence.group_T is not None
    assert batch.sequence.group_T.tolist() == expected
