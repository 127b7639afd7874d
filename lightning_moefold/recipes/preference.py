# SPDX-License-Identifier: Apache-2.0
"""PreferenceModule: DPO, IPO and KTO, with the routers' losses, under every fold.

The loss is a ``loss_fn`` of the model, so it runs where the logits are: on the last stage of a pipeline, on one micro-batch at a
time. What it finds besides the loss, a few numbers for each pair, is written into a table by number and summed over ranks.

What the model before training says of each answer is computed once, before the first step, and kept in checkpoints: a run that is
resumed has the same reference, under any fold. A model whose adapters begin at zero is its own base at that time.

Legend: P pairs of a rank's batch, R rows of a micro-batch, S positions, V vocabulary, N examples of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.arguments import check_number
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import IGNORED
from lightning_moefold.recipes.module import FineTuneModule
from lightning_moefold.recipes.pairs import PreferenceData, placed

PreferenceLoss = Literal["dpo", "ipo", "kto"]
_KEPT, _ROWS = "preference_reference", "preference_rows"  # the names in checkpoints


def log_probabilities(logits_RSV: Tensor, labels_RS: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of the labels of each row, and how many they are, ``[R]`` each."""
    sums, counts = [], []
    for logits_SV, label_S in zip(logits_RSV[:, :-1], labels_RS[:, 1:], strict=True):
        mask_S = label_S != IGNORED
        chosen_TV = logits_SV[mask_S]
        wide = chosen_TV.to(torch.promote_types(chosen_TV.dtype, torch.float32))
        sums.append(-F.cross_entropy(wide, label_S[mask_S], reduction="sum"))
        counts.append(mask_S.sum())
    return torch.stack(sums), torch.stack(counts)


def dpo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """DPO of the log-ratios of policy and reference, for each pair."""
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


def ipo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """IPO, for each pair; the log-ratios are means over the tokens of an answer."""
    return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2


def kto_loss(ratio_P: Tensor, desired_P: Tensor, point: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """KTO, for each answer.

    Args:
        ratio_P: Log-ratios of policy and reference.
        desired_P: Whether an answer is desired.
        point: The reference point, a constant.
        beta: How far the policy may go.
        weights: Of desired and of undesired answers.
    """
    sign_P = torch.where(desired_P, 1.0, -1.0).to(ratio_P.dtype)
    weight_P = torch.where(desired_P, weights[0], weights[1]).to(ratio_P.dtype)
    return weight_P * (1 - torch.sigmoid(beta * sign_P * (ratio_P - point)))


class PreferenceModule(FineTuneModule):
    """Trains a MoE language model on preferences or feedback of :class:`~.pairs.PreferenceData`.

    Logs ``train/loss`` (without the auxiliary loss), ``train/accuracy`` (of pairs, how often the chosen answer has the larger
    reward; of feedback, how often the reward has the right sign), ``train/margin`` (mean difference of the rewards, or mean
    reward with that sign), for KTO ``train/kl``; and the first three of validation.

    Args:
        checkpoint: Directory in Hugging Face format; its model is also the reference.
        loss: ``"dpo"`` and ``"ipo"`` for preferences, ``"kto"`` for feedback.
        beta: How strongly the policy is held to the reference.
        desirable_weight: Of desired answers, for KTO.
        undesirable_weight: Of undesired answers, for KTO.
        learning_rate: After the rise.
        calculate_per_token_loss: False, because losses of pairs are averaged, in accumulated batches too.
        **options: The others of :class:`~.module.FineTuneModule`.

    Raises:
        InputError: For values that cannot be.
    """

    def __init__(
        self,
        checkpoint: str,
        loss: PreferenceLoss = "dpo",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        learning_rate: float = 1e-6,
        calculate_per_token_loss: bool = False,
        **options: Any,
    ) -> None:
        if calculate_per_token_loss:
            raise InputError(
                "calculate_per_token_loss=True divides by labels, and preferences count pairs; leave it out."
            )
        if loss not in ("dpo", "ipo", "kto"):
            raise InputError(f"loss={loss!r} is not known; use 'dpo', 'ipo' or 'kto'.")
        check_number("beta", beta, above=True)
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, weight in weights.items():
            check_number(name, weight)
            if loss != "kto" and weight != 1:
                raise InputError(f"{name}={weight} is KTO's, and loss={loss!r} has no such weight; leave it out.")
        super().__init__(checkpoint, learning_rate=learning_rate, calculate_per_token_loss=False, **options)
        self._loss, self._beta, self._weights = loss, beta, (desirable_weight, undesirable_weight)
        self._reference: dict[str, Tensor] = {}  # [N, 2] of each part: both rows of an example
        self._rows: dict[str, str] = {}  # a fingerprint of the examples of each part
        self._measured: Tensor | None = None  # loss, rightness, margin and number of pairs, summed

    # ---- the reference -----------------------------------------------------------------------------------------

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_data()

    def _check_data(self) -> PreferenceData:
        data, wanted = self.trainer.datamodule, "feedback" if self._loss == "kto" else "preference"  # type: ignore[attr-defined]
        if not isinstance(data, PreferenceData) or data.kind != wanted:
            raise InputError(
                f"loss={self._loss!r} is computed of PreferenceData with kind={wanted!r}; give it as data."
            )
        return data

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._refer("train")
        if len(self._check_data().part("val")):
            self._refer("val")

    @override
    def on_validation_start(self) -> None:
        self._refer("val")

    def _refer(self, name: str) -> None:
        """Has the model say how probable every answer of a part is, unless that is known. Collective."""
        data, model = self._check_data(), self._model()
        count = len(data.part(name))
        if name not in self._reference:
            table_N2 = torch.zeros(count, 2, dtype=torch.float64, device=self.device)
            with _measuring(model):
                for batch in data.in_order(name):
                    batch = self.trainer.strategy.batch_to_device(batch)
                    number_R = placed(batch)
                    found_R, held_R = self._log_probabilities(batch, slice(None))
                    real_R = held_R & (number_R >= 0)
                    half_R = torch.arange(len(number_R), device=self.device) % 2
                    table_N2[number_R[real_R], half_R[real_R]] = found_R[real_R]
            self._reference[name] = sum_over_ranks(model, table_N2).cpu()
        if len(self._reference[name]) != count:
            raise InputError(
                f"the checkpoint holds the reference of {len(self._reference[name])} examples, but {name} has {count}; resume "
                "with the same data."
            )
        found = data.fingerprint(name)
        if self._rows.setdefault(name, found) != found:  # a checkpoint of before has none
            raise InputError(
                f"the checkpoint holds the reference of other rows than those of {name} (their text, tokens, order or "
                "sequence_length differ); resume with the same data and settings."
            )

    def _log_probabilities(self, batch: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Those of some rows of a batch, ``[R]`` float64, and whether this rank has them: it needs the logits."""
        inputs = {name: batch[name][rows] for name in ("input_ids", "labels", "attention_mask")}
        found_R = torch.zeros(len(inputs["input_ids"]), dtype=torch.float64, device=self.device)
        held_R = torch.zeros_like(found_R, dtype=torch.bool)

        def note(logits: Tensor, labels: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
            sum_R, count_R = log_probabilities(logits, labels)
            found_R[place], held_R[place] = sum_R.double(), True
            return sum_R.sum(), count_R.sum()

        self._model()(**inputs, loss_fn=note, place=torch.arange(len(found_R), device=self.device))
        return found_R, held_R

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEPT], checkpoint[_ROWS] = dict(self._reference), dict(self._rows)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._reference, self._rows = dict(checkpoint.get(_KEPT, {})), dict(checkpoint.get(_ROWS, {}))

    # ---- training ----------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output, measured = self._run(batch, "train")
        self._log_means("train", measured[:3] / measured[3].clamp(min=1))
        if output.aux_loss is not None:
            self.log("train/aux_loss", output.aux_loss)
        return output.loss

    def _log_means(self, stage: str, means: Tensor) -> None:
        loss, right, margin = means.unbind()
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log_dict({f"{stage}/accuracy": right, f"{stage}/margin": margin})

    def _run(self, batch: dict[str, Tensor], name: str) -> tuple[Any, Tensor]:
        """The model's output, and loss, rightness, margin and number of pairs, summed over all ranks, float64 ``[4]``."""
        model = self._model()
        self._check_length(batch)
        pairs, micro = len(batch["pair"]), model.num_microbatches
        if pairs % micro:
            raise InputError(
                f"num_microbatches={micro} would cut a batch of {pairs} pairs on each data rank through a pair; use a divisor."
            )
        number_P = batch["pair"]
        reference_P2 = self._reference[name].to(self.device)[number_P.clamp(min=0)]
        table_P4 = torch.zeros(pairs, 4, dtype=torch.float64, device=self.device)
        extras: dict[str, Any]
        if self._loss == "kto":
            rows, reference_R = slice(0, None, 2), reference_P2[:, 0]
            place_R, valid_R = torch.arange(pairs, device=self.device), number_P >= 0
            extras = {"desired": batch["desired"], "point": self._point(batch, reference_P2[:, 1], name)}
        else:
            rows, reference_R = slice(None), reference_P2.flatten()
            place_R = torch.arange(pairs, device=self.device).repeat_interleave(2)
            valid_R, extras = placed(batch) >= 0, {}

        def loss_fn(
            logits: Tensor, labels: Tensor, reference: Tensor, place: Tensor, valid: Tensor, **extras: Any
        ) -> tuple[Tensor, Tensor]:
            sum_R, count_R = log_probabilities(logits, labels)
            ratio_R = sum_R - reference.to(sum_R.dtype)
            if self._loss != "kto":
                place, valid = place[::2], valid[::2]
            loss_P, margin_P = self._losses(ratio_R, count_R, **extras)
            found = (loss_P.detach(), (margin_P > 0), margin_P, valid)
            table_P4[place] = torch.stack([x.double() * valid for x in found], 1)
            return (loss_P * valid).sum(), valid.sum()

        inputs = {key: batch[key][rows] for key in ("input_ids", "labels", "attention_mask")}
        output = model(**inputs, loss_fn=loss_fn, reference=reference_R, place=place_R, valid=valid_R, **extras)
        return output, sum_over_ranks(model, table_P4.sum(0))

    def _losses(self, ratio_R: Tensor, count_R: Tensor, **extras: Any) -> tuple[Tensor, Tensor]:
        """The loss of each pair or answer, and its margin."""
        if self._loss == "kto":
            loss_P = kto_loss(ratio_R, extras["desired"], extras["point"].to(ratio_R.dtype), self._beta, self._weights)
            return loss_P, torch.where(extras["desired"], ratio_R, -ratio_R).detach() * self._beta
        if self._loss == "ipo":
            ratio_R = ratio_R / count_R.clamp(min=1)
        loss = dpo_loss if self._loss == "dpo" else ipo_loss
        return loss(ratio_R[::2], ratio_R[1::2], self._beta), (ratio_R[::2] - ratio_R[1::2]).detach() * self._beta

    def _point(self, batch: dict[str, Tensor], reference_P: Tensor, name: str) -> Tensor:
        """KTO's reference point: the mean log-ratio of answers to other prompts over all ranks, at least 0; no gradient."""
        model = self._model()
        with _measuring(model):
            found_P, held_P = self._log_probabilities(batch, slice(1, None, 2))
        valid_P = (batch["pair"] >= 0) & held_P
        sums = sum_over_ranks(model, torch.stack([((found_P - reference_P) * valid_P).sum(), valid_P.double().sum()]))
        point = (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
        if name == "train":
            self.log("train/kl", point)
        return point

    # ---- measuring ---------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, measured = self._run(batch, "val")
        self._measured = measured if self._measured is None else self._measured + measured

    @override
    def on_validation_epoch_end(self) -> None:
        assert self._measured is not None
        self._log_means("val", self._measured[:3] / self._measured[3])
        self._measured = None

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        raise InputError("PreferenceModule measures preferences in validation; use it instead of test.")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        raise InputError("PreferenceModule does not predict; use FineTuneModule with its checkpoint.")

    def _model(self) -> MoECausalLM:
        assert self.model is not None
        return self.model


@contextmanager
def _measuring(model: MoECausalLM) -> Iterator[None]:
    """The model in evaluation and without gradients, so that counters of load and noise stay as they are."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sum_over_ranks(model: MoECausalLM, x: Tensor) -> Tensor:
    """Sums what ranks have found where their logits are; tp and cp ranks have found the same. Collective."""
    mesh = model.mesh
    if mesh is None:
        return x
    first = mesh.tp.index == 0 and mesh.axis("cp").index == 0
    x = x.clone() if first else torch.zeros_like(x)
    comm.all_reduce_raw(x, mesh.world)
    return x
