# SPDX-License-Identifier: Apache-2.0
"""What cannot work under a fold, each refused in one sentence that says what to do."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_moefold.fold import Fold
from lightning_moefold.models import MoECausalLM
from lightning_moefold.modules.base import parallel_roots

_CALLBACKS = {
    StochasticWeightAveraging: "it copies the module, whose weights are spread over ranks; average exported checkpoints instead",
    WeightAveraging: "it copies the module, whose weights are spread over ranks; average exported checkpoints instead",
    OnExceptionCheckpoint: "a save needs every rank, and only the failing one would call it; use ModelCheckpoint",
    BackboneFinetuning: "it adds parameters to the optimizer by hand; freeze with requires_grad_(False) in configure_model",
    LearningRateFinder: "it saves and restores the model behind the strategy's back; tune on a small model in one process",
    BatchSizeFinder: "it saves and restores the model behind the strategy's back; set the batch size by hand",
}


class UnsupportedFeature(ValueError):
    """Something that cannot work under this strategy; the message says what to do instead."""


def check_blocks(module: nn.Module, fold: Fold) -> None:
    """Context and pipeline parallelism need to know where rows and layers are, which only a language model does.

    Raises:
        UnsupportedFeature: For blocks in networks of the user's own, and for a pipeline without a model.
    """
    roots = parallel_roots(module)
    for name, root in roots:
        if fold.cp * fold.pp > 1 and not isinstance(root, MoECausalLM):
            axis, size = ("context", fold.cp) if fold.cp > 1 else ("pipeline", fold.pp)
            what = "rows context" if fold.cp > 1 else "layers pipeline"
            raise UnsupportedFeature(
                f"{name or type(root).__name__} is in a network of your own, whose {what} parallelism cannot cut; use "
                f"{axis}_parallel_size=1 instead of {size}."
            )
    if fold.pp > 1 and not roots:
        raise UnsupportedFeature(
            f"{type(module).__name__} holds no MoECausalLM to cut into stages; use pipeline_parallel_size=1 instead of {fold.pp}."
        )


def check_second_names(module: nn.Module) -> None:
    """Once models are parallelised, everything has storage but what a pipeline has taken off this rank.

    Raises:
        UnsupportedFeature: For a part of a model that the module holds under a name of its own, on another stage.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UnsupportedFeature(
                f"{name!r} is a second name for a part of a model that another pipeline stage holds; reach it through the model "
                "instead, or use pipeline_parallel_size=1."
            )


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Checks what is known before anything is built.

    Raises:
        UnsupportedFeature: Naming the feature and the way out.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise UnsupportedFeature(f"{type(callback).__name__} does not work with MoEFoldStrategy: {reason}.")
        if isinstance(callback, ModelCheckpoint) and getattr(callback, "save_on_exception", False):
            raise UnsupportedFeature(
                "ModelCheckpoint(save_on_exception=True) would save on the failing rank only; turn it off."
            )
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise UnsupportedFeature(
            "sync_batchnorm=True is not supported; leave it off, or use a norm without batch statistics."
        )
    if hasattr(module, "_compiler_ctx") and module._compiler_ctx is not None:
        raise UnsupportedFeature(
            "a compiled LightningModule is not supported; compile blocks inside configure_model instead."
        )


def check_sharding(sharding: str, precision: str, module: nn.Module) -> None:
    """Mixed precision is FSDP2's, so there must be something for it to wrap.

    Raises:
        UnsupportedFeature: For mixed precision with replicated weights.
    """
    if sharding == "none" and precision == "bf16-mixed" and any(isinstance(m, MoECausalLM) for m in module.modules()):
        raise UnsupportedFeature(
            "precision='bf16-mixed' with data_parallel_sharding='none' is not supported, as FSDP2 does the casting; "
            "use data_parallel_sharding='optimizer', or precision='bf16-true'."
        )


def check_optimizers(trainer: pl.Trainer, sharded: bool) -> None:
    """Checks what ``configure_optimizers`` returned.

    Args:
        trainer: The Trainer.
        sharded: Whether parameters are stored in pieces; otherwise every rank has them whole, as under DDP.

    Raises:
        UnsupportedFeature: For optimizers that need whole parameters.
    """
    for optimizer in trainer.optimizers:
        kind = type(optimizer).__name__
        if sharded and kind in ("LBFGS", "Adafactor", "Muon"):
            raise UnsupportedFeature(
                f"{kind} computes with whole parameters, of which a rank holds pieces; use AdamW or SGD."
            )
