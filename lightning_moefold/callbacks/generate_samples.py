# SPDX-License-Identifier: Apache-2.0
"""GenerateSamples: texts that the model writes after validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_moefold.callbacks.common import logged_step
from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.errors import InputError, InputTypeError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.texts import continue_texts
from lightning_moefold.models.weights import CheckpointWeights


class GenerateSamples(Callback):
    """Continues prompts after validation, prints the texts, and logs them as a table to Weights & Biases if that is used.

    The module's first MoECausalLM generates; the prompts are dealt to the data ranks. Training continues exactly as
    without it.

    Args:
        prompts: The texts to continue, at least one.
        tokenizer: A tokenizer of ``transformers``, or the directory of one. By default that of the data if it comes
            from :class:`~.recipes.TextData`, otherwise that of the model's checkpoint.
        every_n_validations: Generate after every n-th validation run; the sanity check does not count.
        max_new_tokens: Maximum number of tokens to add.
        seed: Seed of the draws with ``do_sample=True``, which gives the same texts under every fold.
        **options: Arguments of :meth:`~lightning_moefold.MoECausalLM.generate`, such as ``do_sample=True,
            temperature=0.7``.

    Attributes:
        samples: Prompts and continuations of the latest run, on every rank.

    Raises:
        ValueError: If there is no prompt, or ``every_n_validations`` is not positive.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: Any | None = None,
        every_n_validations: int = 1,
        max_new_tokens: int = 40,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts={prompts!r} must be a list of at least one text.")
        if every_n_validations < 1:
            raise InputError(f"every_n_validations={every_n_validations} must be at least 1.")
        self.prompts, self.every_n_validations = list(prompts), every_n_validations
        self.options = {"max_new_tokens": max_new_tokens, "seed": seed, **options}
        self.samples: list[tuple[str, str]] = []
        self._tokenizer = tokenizer
        self._validations = 0
        self._table: list[list[Any]] = []

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        model = next((m for m in pl_module.modules() if isinstance(m, MoECausalLM)), None)
        if model is None:
            raise InputTypeError(f"{type(pl_module).__name__} holds no MoECausalLM; GenerateSamples needs one.")
        texts = continue_texts(model, self.prompts, lambda: self._load(model), **self.options)
        self.samples = list(zip(self.prompts, texts, strict=True))
        lines = [f"step {trainer.global_step}: {p} | {' '.join(text.split())}" for p, text in self.samples]
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            (print if bar is None or trainer.state.fn != TrainerFn.FITTING else bar.print)("\n".join(lines))
        self._table += [[trainer.global_step, *sample] for sample in self.samples]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["step", "prompt", "text"]
                # A copy, because wandb writes it later.
                logger.log_table("samples", columns, list(self._table), step=logged_step(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "table": list(self._table)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._table = state_dict["validations"], list(state_dict["table"])

    def _load(self, model: MoECausalLM) -> Any:
        """Loads the tokenizer, on ranks that need it."""
        path = self._tokenizer if self._tokenizer is not None else model.tokenizer_path
        if path is None:
            if not isinstance(model.source, CheckpointWeights):
                raise InputError("the model comes from no checkpoint, so GenerateSamples needs tokenizer=... .")
            path = model.source.checkpoint.path
        if isinstance(path, (str, Path)):
            self._tokenizer = load_tokenizer(Path(path))
        return self._tokenizer
