# SPDX-License-Identifier: Apache-2.0
"""Jobs in which something is wrong, on one rank or on all; each returns what this rank was told."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.parallel import Settings, local_part, parallelize
from tests.strategy import finetune
from tests.strategy.finetune import Finetune, make


def told(action: Callable[[], Any]) -> str:
    """The error of an action, as ``Kind: message``; all ranks must get here."""
    try:
        action()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    dist.barrier()
    return message


def make_model(path: str, fold: str, **options: Any) -> MoECausalLM:
    model = MoECausalLM.from_pretrained(path, **options)
    parallelize(model, FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu"), Settings(), torch.device("cpu"))
    return model


def _batches(rank: int) -> dict[str, dict[str, Any]]:
    """A batch that is wrong on the ranks of data rank ``rank`` only."""
    good = finetune.rows(4)
    bad_token, bad_label, negative = good.clone(), good.clone(), good.clone()
    bad_token[1, 2], bad_label[2, 3], negative[0, 0] = finetune.VOCABULARY, finetune.VOCABULARY + 5, -1
    return {
        "token": {"input_ids": bad_token, "labels": good},
        "negative token": {"input_ids": negative, "labels": good},
        "label": {"input_ids": good, "labels": bad_label},
        "no rows": {"input_ids": good[:0], "labels": good[:0]},
        "shape of labels": {"input_ids": good, "labels": good[:, :3]},
        "shape of mask": {"input_ids": good, "labels": good, "attention_mask": torch.ones(3, 6)},
        "floats": {"input_ids": good.float(), "labels": good},
        "mask of floats": {"input_ids": good, "labels": good, "attention_mask": torch.ones(good.shape)},
        "negative mask": {"input_ids": good, "labels": good, "attention_mask": torch.full_like(good, -1)},
        "one dimension": {"input_ids": good[0], "labels": good[0]},
    }


def batches(path: str, fold: str) -> dict[str, str]:
    model = make_model(path, fold)
    model.num_microbatches = 2
    assert model.mesh is not None
    guilty = model.mesh.place["dp"] == 1
    good: dict[str, Tensor] = {"input_ids": finetune.rows(4), "labels": finetune.rows(4)}
    return {
        name: told(lambda b=batch: model(**(b if guilty else good)).loss.backward())
        for name, batch in _batches(1).items()
    } | {"good again": told(lambda: model(**good).loss.backward())}


def saves(path: str, folder: str) -> dict[str, str]:
    model = make_model(path, "| ep2")
    root = Path(folder)
    if dist.get_rank() == 0:
        (root / "foreign").mkdir()
        (root / "foreign" / "thesis.tex").write_text("years of work")
        (root / "file").write_text("a file")
    dist.barrier()
    places = {"foreign": root / "foreign", "file": root / "file", "below a file": root / "file" / "below"}
    return {name: told(lambda p=place: model.save_pretrained(p)) for name, place in places.items()}


def starts(path: str, folds: list[str]) -> dict[str, str]:
    return {fold: told(lambda f=fold: make(f, {"max_steps": 1}).fit(Finetune(path))) for fold in folds}


class _Optimizers(Finetune):
    def configure_optimizers(self) -> Any:
        kind = self.spec["kind"]
        if kind in ("rows", "plain rows"):
            return _RowState(self.parameters(), {"lr": 0.1, "plain": kind == "plain rows"})
        return getattr(torch.optim, kind)(self.parameters())

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.spec["kind"] not in ("rows", "plain rows"), "it has gone on after the first step"


class _RowState(torch.optim.Optimizer):
    """Keeps a number for each row, as optimizers with factored state do; of the whole, or of what this rank holds."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = local_part(parameter.grad) if group["plain"] else parameter.grad
                self.state[parameter]["row"] = grad[..., 0].abs()
        return loss


def features(path: str, folder: str) -> dict[str, str]:
    """Parts of Lightning that cannot work."""
    # Told after the first step, long before the first save.
    saving = {"callbacks": [ModelCheckpoint(folder, filename="rows")], "enable_checkpointing": True, "max_steps": 2}
    cases: dict[str, tuple[type[Finetune], dict[str, Any], dict[str, Any]]] = {
        "sync_batchnorm": (Finetune, {}, {"sync_batchnorm": True}),
        "LBFGS": (_Optimizers, {"kind": "LBFGS"}, {}),
        "Adafactor": (_Optimizers, {"kind": "Adafactor"}, {}),
        "state of shape": (_Optimizers, {"kind": "rows"}, saving),
        "the optimizer keeps state": (_Optimizers, {"kind": "plain rows"}, saving),
    }  # fmt: skip
    return {
        name: told(lambda k=kind, s=spec, a=arguments: make("| ep2", {"max_steps": 1, **a}).fit(k(path, **s)))
        for name, (kind, spec, arguments) in cases.items()
    }


def loads(paths: list[str], fold: str) -> list[str]:
    """What a Trainer says to damaged or foreign directories."""
    return [told(lambda p=path: make(fold, {"max_steps": 1}).fit(Finetune(p))) for path in paths]


def damaged_on_one_rank(path: str) -> str:
    return _fail_on_one_rank(lambda: told(lambda: make("| ep2", {"max_steps": 1}).fit(Finetune(path))))


def _fail_on_one_rank(action: Callable[[], str]) -> str:
    """One rank sees a damaged copy (a node's local disk); reading its slices fails there only."""
    original = MoECausalLM.load_weights

    def load(self: MoECausalLM) -> None:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        original(self)

    MoECausalLM.load_weights = load  # type: ignore[method-assign]
    try:
        return action()
    finally:
        MoECausalLM.load_weights = original  # type: ignore[method-assign]


class _NoInput(Finetune):
    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return {}["input_ids"]


def printed(path: str) -> dict[str, str]:
    """What Python prints of an error that ends the process."""

    def end(module: Finetune) -> str:
        before = sys.excepthook
        try:
            make("| ep2", {"max_steps": 1}).fit(module)
        except Exception as error:
            with contextlib.redirect_stderr(io.StringIO()) as screen:
                sys.excepthook(type(error), error, error.__traceback__)
            return screen.getvalue()
        finally:
            sys.excepthook = before
            dist.barrier()
        return "no error"

    return {
        "one rank fails": _fail_on_one_rank(lambda: end(Finetune(path))),
        "all refuse": end(_Optimizers(path, kind="LBFGS")),
        "user's error": end(_NoInput(path)),
    }


def foreign_checkpoint(path: str, other: str, folder: str) -> dict[str, str]:
    run = make("| ep2", {"max_steps": 1})
    run.fit(Finetune(path))
    target = Path(folder, "model.ckpt")
    run.save_checkpoint(target)
    seen = {
        "other model": told(lambda: make("", {"max_steps": 2}).fit(Finetune(other), ckpt_path=str(target))),
        "other optimizer": told(
            lambda: make("", {"max_steps": 2}).fit(Finetune(path, frozen=["*.experts.*"]), ckpt_path=str(target))
        ),
    }
    dist.barrier()
    if dist.get_rank() == 0:
        for file in target.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:100])
        (Path(folder) / "single.ckpt").write_bytes(b"nothing")
        (Path(folder) / "empty.ckpt").mkdir()
    dist.barrier()
    for name, file in (
        ("truncated", target),
        ("single file", "single.ckpt"),
        ("empty", "empty.ckpt"),
        ("absent", "absent.ckpt"),
    ):
        seen[name] = told(lambda f=file: make("", {"max_steps": 2}).fit(Finetune(path), ckpt_path=str(Path(folder, f))))
    return seen
