# SPDX-License-Identifier: Apache-2.0
"""FineTuneModule: next-token training of a Mixture-of-Experts language model."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import AdamW
from typing_extensions import override

from lightning_moefold.adapters import LoRA
from lightning_moefold.arguments import check_choice, check_count, check_number
from lightning_moefold.checkpoint import stores
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.masks import shortest_window
from lightning_moefold.modules.quantization import Quantization
from lightning_moefold.modules.quantized import Codec
from lightning_moefold.optim import MasterWeights, offload_state
from lightning_moefold.recipes.metrics import DocumentLosses, MeanLoss, write_document_losses
from lightning_moefold.recipes.optimizer import Schedule, parameter_groups, run_length, warmup_and_decay
from lightning_moefold.strategy import MoEFoldStrategy


class FineTuneModule(pl.LightningModule):
    """Trains a MoE language model, from a checkpoint or from random weights; nothing in it knows of ranks.

    Logs ``train/loss`` (without the auxiliary loss), ``train/aux_loss``, and for validation and test the mean loss over
    all label tokens (``val/loss``, ``test/loss``) and its exponential (``val/perplexity``, ``test/perplexity``).
    ``predict`` writes a file with the loss of every document.

    Args:
        checkpoint: Directory in Hugging Face format: Mixtral, Qwen2-MoE or Qwen3-MoE.
        initial_seed: Begin with random weights drawn from this seed, and take only config.json from ``checkpoint``.
        learning_rate: After the rise.
        warmup_steps: Optimizer steps of linear rise.
        schedule: How the learning rate falls after that, until the end of the run.
        total_steps: The step at which it has fallen, if that is not the end of the run, or if nothing tells the end: a
            stream without a length, an endless number of epochs.
        final_learning_rate: Where it ends, as a share of ``learning_rate``.
        weight_decay: Of matrices; norms and biases have none.
        betas: Of AdamW.
        aux_loss: Whether the load-balancing loss is trained with (with the weight that config.json gives it).
        config_overrides: Fields of config.json to replace, such as ``{"router": {"bias_update_rate": 0.001}}``.
        freeze: Patterns of parameter names that are not trained, such as ``*.mlp.gate.*`` for the routers.
        adapter: Train a new adapter instead of the model: the fields of :class:`~lightning_moefold.LoRA`, such as
            ``{"rank": 16, "targets": ["q_proj", "v_proj", "experts"]}``.
        quantize: With an adapter: store the frozen weights of attention, dense layers and experts in fewer bytes, ``nf4`` (4
            bits a number, needs bitsandbytes) or ``int8``.
        adapter_path: Train a stored adapter instead: a directory in PEFT's format.
        calculate_per_token_loss: Whether accumulated batches are divided by the labels of the optimizer step, so that every
            label weighs the same (:class:`~lightning_moefold.MoEFoldStrategy`); otherwise their losses are averaged.
        master_weights: Whether to update float32 copies of the weights (:class:`~lightning_moefold.optim.MasterWeights`), for
            ``precision="bf16-true"``.
        offload_state: Whether the optimizer's state is in host memory between steps
            (:func:`~lightning_moefold.optim.offload_state`).
        predictions: File that ``predict`` writes; predictions.jsonl in the Trainer's default_root_dir if not given.

    Attributes:
        predicted: On rank 0 the file that ``predict`` has written, and the number of documents in it.
    """

    def __init__(
        self,
        checkpoint: str,
        initial_seed: int | None = None,
        learning_rate: float = 1e-4,
        warmup_steps: int = 10,
        schedule: Schedule = "cosine",
        final_learning_rate: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        aux_loss: bool = True,
        config_overrides: dict[str, Any] | None = None,
        freeze: list[str] | None = None,
        calculate_per_token_loss: bool = True,
        predictions: str | None = None,
        total_steps: int | None = None,
        adapter: dict[str, Any] | None = None,
        adapter_path: str | None = None,
        master_weights: bool = False,
        offload_state: bool = False,
        quantize: Quantization | None = None,
    ) -> None:
        super().__init__()
        check_number("learning_rate", learning_rate)
        check_count("warmup_steps", warmup_steps, 0)
        check_choice("schedule", schedule, get_args(Schedule))
        check_number("final_learning_rate", final_learning_rate)
        check_number("weight_decay", weight_decay)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise InputError(f"betas={betas!r} must be two numbers, such as (0.9, 0.95).")
        for number, beta in enumerate(betas):
            check_number(f"betas[{number}]", beta, most=1, below=True)
        if total_steps is not None:
            check_count("total_steps", total_steps)
        self.save_hyperparameters()
        if adapter is not None:
            LoRA.of(adapter)  # says at once what is wrong
        if adapter is not None and adapter_path is not None:
            raise InputError(
                "adapter and adapter_path are both given; use adapter for a new one, adapter_path for a stored one."
            )
        if quantize is not None:
            Codec(quantize, torch.get_default_dtype())  # says at once what is wrong
            if adapter is None and adapter_path is None:
                raise InputError(
                    f"quantize={quantize!r} stores weights that then cannot train; give an adapter too, or leave it out."
                )
        self.model: MoECausalLM | None = None
        self.predicted: tuple[Path | str, int] | None = None
        self._mean, self._documents = MeanLoss(), DocumentLosses()
        self._warned_of_length = False

    @property
    def calculate_per_token_loss(self) -> bool:
        """What the strategy is asked for."""
        return bool(self.hparams["calculate_per_token_loss"])

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        path, options = self.hparams["checkpoint"], {"output_router_logits": self.hparams["aux_loss"]}
        options |= self.hparams["config_overrides"] or {}
        quantize = self.hparams["quantize"]
        if self.hparams["initial_seed"] is None:
            self.model = MoECausalLM.from_pretrained(path, quantize=quantize, **options)
        else:
            config = MoEConfig.from_pretrained(path, **options)
            self.model = MoECausalLM.from_config(config, seed=self.hparams["initial_seed"], quantize=quantize)
        if self.hparams["adapter"] is not None:
            self.model.add_adapter(self.hparams["adapter"])
        if self.hparams["adapter_path"] is not None:
            self.model.load_adapter(self.hparams["adapter_path"])
        self._freeze(self.model)

    def _freeze(self, model: MoECausalLM) -> None:
        parameters = dict(model.named_parameters())
        for pattern in self.hparams["freeze"] or []:
            frozen = fnmatch.filter(parameters, pattern)
            if not frozen:
                raise InputError(
                    f"freeze: no parameter is named like {pattern!r}; names are like {next(iter(parameters))!r}."
                )
            for name in frozen:
                parameters[name].requires_grad_(False)
        if self.hparams["freeze"] and not any(parameter.requires_grad for parameter in parameters.values()):
            raise InputError(f"freeze={self.hparams['freeze']!r} leaves no parameter to train; leave out a pattern.")

    # ---- training ----------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self) -> None:
        strategy, accumulated = self.trainer.strategy, self.trainer.accumulate_grad_batches
        if self.calculate_per_token_loss and accumulated > 1 and not isinstance(strategy, MoEFoldStrategy):
            raise InputError(
                "calculate_per_token_loss=True divides accumulated batches by the labels of the step, which "
                f"{type(strategy).__name__} does not do; use MoEFoldStrategy, or set it to False."
            )

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.model is not None
        self._check_length(batch)
        output = self.model(**batch)
        self.log("train/loss", output.lm_loss, prog_bar=True)
        if output.aux_loss is not None:
            self.log("train/aux_loss", output.aux_loss)
        if output.z_loss is not None:
            self.log("train/z_loss", output.z_loss)
        return output.loss

    @override
    def configure_optimizers(self) -> Any:
        values = self.hparams
        groups = parameter_groups(self, values["weight_decay"])
        options = {"lr": values["learning_rate"], "betas": tuple(values["betas"]), "fused": True}
        optimizer = MasterWeights(AdamW, groups, **options) if values["master_weights"] else AdamW(groups, **options)
        if values["offload_state"]:
            offload_state(optimizer)
        schedule = warmup_and_decay(
            optimizer,
            values["warmup_steps"],
            self._total_steps,
            values["schedule"],
            values["final_learning_rate"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        given = self.hparams["total_steps"]
        return run_length(self.trainer) if given is None else int(given)

    @override
    def on_train_start(self) -> None:
        if self.hparams["schedule"] == "constant" or self.hparams["total_steps"] is not None:
            return
        try:
            total, error = run_length(self.trainer), None
        except InputError as unknown:
            total, error = -1, unknown
        strategy = self.trainer.strategy
        ends = torch.tensor([total, -total], device=strategy.root_device)
        most, least = strategy.reduce(ends, reduce_op="max").tolist()
        if error is not None:
            raise error
        if most != -least:
            raise InputError(
                f"ranks have from {max(-least, 0)} to {most} steps to make, so that their learning rates would differ; give "
                "each as many batches, or set total_steps of the module."
            )

    def _check_length(self, batch: dict[str, Tensor]) -> None:
        """Warns once of rows that reach positions for which the model was not made."""
        assert self.model is not None
        length, longest = batch["input_ids"].shape[1], self.model.config.raw.get("max_position_embeddings")
        if longest is not None and length > longest and not self._warned_of_length:
            self._warned_of_length = True
            rank_zero_warn(
                f"rows have {length} tokens and the model's max_position_embeddings is {longest}: tokens further than "
                "that from the beginning of their document are at positions that the model may not know."
            )

    # ---- measuring ---------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure(batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure(batch)

    def _measure(self, batch: dict[str, Tensor]) -> None:
        assert self.model is not None
        self._check_length(batch)
        self._mean.add(self.model(**batch).lm_loss, batch, shortest_window(self.model.config))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_mean("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_mean("test")

    def _log_mean(self, stage: str) -> None:
        loss = self._mean.compute(self.trainer.strategy)
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self.model is not None
        self._check_length(batch)
        inputs = {name: x for name, x in batch.items() if name not in ("labels", "source_ids")}
        logits = self.model(**inputs, gather_logits=True).logits
        self._documents.add(logits, batch, shortest_window(self.model.config))

    @override
    def on_predict_epoch_end(self) -> None:
        sums = self._documents.compute(self.trainer.strategy)
        given = self.hparams["predictions"]
        root = stores.parse_path(self.trainer.default_root_dir)
        path = stores.join(root, "predictions.jsonl") if given is None else stores.parse_path(given)
        if self.trainer.is_global_zero:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            name_of = data.part("predict").rows.store.name if hasattr(data, "part") else None
            self.predicted = path, write_document_losses(path, sums, name_of)
            rank_zero_info(f"The loss of each document is in {path}.")
