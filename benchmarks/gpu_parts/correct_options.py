# SPDX-License-Identifier: Apache-2.0
"""Options that move, round or drop something, in short runs beside those without them; and text in bfloat16."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gpu_parts.correct_training import Language, Optimizers, fit, plain_attention
from gpu_parts.record import Context, free_memory, synchronize
from lightning_moefold import LoRA, MoECausalLM, MoEConfig, MoEFoldStrategy
from lightning_moefold.modules import offload
from lightning_moefold.optim import offload_state, state_offload

_ADAMW: Optimizers = partial(torch.optim.AdamW, lr=1e-3)
_STEPS = 4


@dataclass(frozen=True)
class _Run:
    """What a run leaves.

    Args:
        losses: Of its steps.
        weights: At its end.
        reserved: Gigabytes that the allocator had reserved at most; None on CPU.
    """

    losses: list[float]
    weights: list[Tensor]
    reserved: float | None

    def beside(self, plain: _Run) -> dict[str, Any]:
        """Cells: how far losses are from those of another run, and the memory of both."""
        apart = max(abs(a - b) / abs(b) for a, b in zip(self.losses, plain.losses, strict=True))
        same = self.losses == plain.losses and all(map(torch.equal, self.weights, plain.weights))
        return {"last loss": self.losses[-1], "without": plain.losses[-1], "largest difference": apart, "equal bits": same,
                "reserved GB": self.reserved, "without, GB": plain.reserved}  # fmt: skip


#: Returns the run without an option, which is made once.
Plain = Callable[[], _Run]


def run(ctx: Context) -> None:
    """Each option, then text. With FP8 and dropout nothing is equal: losses must be near, or equal to those of recomputation."""
    plain = cache(partial(_train, ctx))
    table = f"a small language model, {_STEPS} steps, attention by plain products: options beside the run without them"
    for name, function in (
        ("offload_state", partial(_offload_state, ctx, plain)),
        ("offload_activations", partial(_offload_activations, ctx, plain)),
        ("async_save, and resumed from the save", partial(_async_save, ctx, plain)),
        ("expert_kernel='fp8'", partial(_float8, ctx, plain)),
        ("LoRA with dropout and recompute='full', beside the same without recompute", partial(_dropout, ctx)),
    ):
        ctx.record.attempt(table, name, function)
        free_memory()
    ctx.record.attempt("text", "generate in bfloat16, beside whole rows without a cache", partial(_generate, ctx))


def _train(
    ctx: Context, make: Optimizers = _ADAMW, adapter: LoRA | None = None, fit_options: dict[str, Any] | None = None, **options: Any
) -> _Run:  # fmt: skip
    free_memory()
    if ctx.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    module = Language(make, ctx.pick(512, 16), ctx.pick(1024, 32), adapter)
    with plain_attention():
        weights = fit(ctx, module, _STEPS, "bf16-mixed", MoEFoldStrategy(**options), **fit_options or {})
    reserved = torch.cuda.max_memory_reserved() / 1e9 if ctx.on_gpu else None
    return _Run(module.losses, weights, reserved)


def _offload_state(ctx: Context, plain: Plain) -> dict[str, Any]:
    went: list[str] = []
    kind = state_offload._Offloaded
    with (
        mock.patch.object(offload, "DEVICES", {ctx.device.type}),
        mock.patch.object(kind, "_host_like", _counted(kind._host_like, went)),
    ):
        found = _train(ctx, lambda parameters: offload_state(_ADAMW(parameters)))
    cells = found.beside(plain())
    return cells | {"tensors that went": len(went), "ok": cells["equal bits"] and bool(went)}


def _offload_activations(ctx: Context, plain: Plain) -> dict[str, Any]:
    went: list[str] = []
    with (
        mock.patch.object(offload, "DEVICES", {ctx.device.type}),
        mock.patch.object(offload, "SMALLEST", ctx.pick(offload.SMALLEST, 0)),
        mock.patch.object(offload, "_Kept", _counted(offload._Kept, went)),
    ):
        found = _train(ctx, offload_activations=True)
    cells = found.beside(plain())
    return cells | {"tensors that went": len(went), "ok": cells["equal bits"] and bool(went)}


def _counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """A function that notes its calls, and not, as a mock, their tensors, whose memory is measured."""

    def call(*args: Any) -> Any:
        calls.append("")
        return function(*args)

    return call


def _async_save(ctx: Context, plain: Plain) -> dict[str, Any]:
    folder, half = ctx.scratch / "async", _STEPS // 2
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=half, save_top_k=-1)
    found = _train(ctx, fit_options={"callbacks": [saves]}, async_save=True)
    resumed = _train(ctx, fit_options={"ckpt": folder / f"step={half}.ckpt"})
    cells = found.beside(plain())
    same = resumed.losses == plain().losses[half:] and all(map(torch.equal, resumed.weights, plain().weights))
    return cells | {"resumed: equal bits": same, "ok": cells["equal bits"] and same}


def _float8(ctx: Context, plain: Plain) -> dict[str, Any]:
    ctx.needs_float8()
    cells = _train(ctx, expert_kernel="fp8").beside(plain())
    return cells | {"ok": cells["largest difference"] < 3e-2 and not cells["equal bits"]}


def _dropout(ctx: Context) -> dict[str, Any]:
    lora = partial(LoRA, rank=8, targets=["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
    none, plain = (_train(ctx, adapter=lora(dropout=share)) for share in (0.0, 0.5))
    found = _train(ctx, adapter=lora(dropout=0.5), recompute="full")
    cells = found.beside(plain)
    at_first = plain.losses[0] == none.losses[0]  # B is zero
    return cells | {"without dropout": none.losses[-1],
                    "ok": cells["largest difference"] < 1e-3 and at_first and none.losses[-1] != plain.losses[-1]}  # fmt: skip


def _generate(ctx: Context) -> dict[str, Any]:
    """Each token must be the most probable one of a pass over the whole row, but for the rounding of bfloat16."""
    config = Language(_ADAMW, 0, ctx.pick(1024, 32)).config | {"num_hidden_layers": 4, "vocab_size": 1000}
    model = MoECausalLM.from_config(MoEConfig.from_hf(config)).to(ctx.device, torch.bfloat16)
    prompt, count = ctx.pick((64, 64), (6, 4))
    token = torch.randint(1, 1000, (4, prompt), generator=torch.Generator().manual_seed(0)).to(ctx.device)
    mask = torch.ones(4, prompt + count, dtype=torch.int64, device=ctx.device)
    mask[1, : prompt // 2] = 0
    generate = partial(model.generate, token, mask[:, :prompt], max_new_tokens=count, eos_token_id=(), pad_token_id=0)
    generate()
    synchronize()
    start = time.perf_counter()
    text = generate()
    synchronize()
    spent = time.perf_counter() - start
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model.eval()(text, attention_mask=mask, position_ids=place).logits[:, prompt - 1 : -1].float()
    chosen = logits.gather(2, text[:, prompt:].unsqueeze(2)).squeeze(2)
    behind = float(((logits.amax(2) - chosen) / logits.std(2)).max())
    share = float((logits.argmax(2) == text[:, prompt:]).float().mean())
    return {"tokens that agree": share, "logit behind the largest, in deviations": behind, "ms per token": spent / count * 1e3,
            "ok": behind < 0.2}  # fmt: skip
