# SPDX-License-Identifier: Apache-2.0
"""Reads a language-model batch once: shifts labels, finds documents, marks padding and records errors.

Errors in the data, such as a token id outside the vocabulary, are only *recorded* here. All ranks agree on them before
any raises (:mod:`.losses`); a rank that raised alone would leave its peers waiting forever.

Legend: B rows, S positions, L positions of this cp rank, N = B * L tokens, T tokens of this tp rank, V vocabulary, M
micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.agreement import PRIME
from lightning_moefold.errors import BatchError, InputError
from lightning_moefold.layout import even_split
from lightning_moefold.mesh import SINGLE, Axis
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.masks import IGNORED, find_targets, read_mask, shift, shortest_window
from lightning_moefold.modules.attention.exchanges import Exchange, padded_length
from lightning_moefold.modules.attention.layout import ContextLayout
from lightning_moefold.modules.attention.rotary import rotary_tables
from lightning_moefold.modules.sequence import SequenceBatch


@dataclass
class CausalLMBatch:
    """A batch on this rank, in the form that the model needs.

    Args:
        token_N: Token ids; ids outside the vocabulary have been replaced.
        sequence: Description of the rows for the layers.
        true_length: S as passed by the caller; rows may be padded beyond it.
        labels: The labels of whole rows for a custom loss, ``[B, S]`` at the positions of the tokens; ``IGNORED`` where no
            position predicts them.
        target_N: The label that each position predicts; ``IGNORED`` if none.
        weight_N: Weight of each position's loss.
        labelled_index: Positions that have a target.
        fingerprint: A number below :data:`~.agreement.PRIME` for the data of all cp ranks, on the device.
        sizes: On the device, what losses of routers are divided by: this rank's tokens that count, and the rows of this
            data rank that have any (float ``[2]``).
        routing: Tables of routing statistics of the MoE layers, as the decoder collects them.
        faults: Float vector ``[bad ids, bad labels, malformed]`` on the device, zero where all is well.
        error: Why the batch could not be read, where an empty one stands in its place.
        is_empty: Whether it stands for a micro-batch that has no row on this rank.
        last_only: Whether the logits of each row's last position are wanted, and no others.
    """

    token_N: Tensor
    sequence: SequenceBatch
    true_length: int
    labels: Tensor | None
    target_N: Tensor
    weight_N: Tensor
    labelled_index: Tensor
    faults: Tensor
    fingerprint: Tensor
    sizes: Tensor
    routing: list[Tensor]
    _position_BL: Tensor
    _config: MoEConfig
    error: BatchError | None = None
    is_empty: bool = False
    last_only: bool = False

    def set_rotary_tables(self, dtype: torch.dtype) -> None:
        """Computes the rotary tables in the dtype of the hidden states."""
        config = self._config
        tables = rotary_tables(self._position_BL, config.head_dim, config.rope_theta, dtype, config.rope_scaling_factor)
        self.sequence.cos_BLh, self.sequence.sin_BLh = tables


class BatchAxes(NamedTuple):
    """The axes over which a batch is spread, and the exchange of attention over cp.

    Args:
        tp: Axis over which tokens are spread.
        cp: Axis over which the positions of each row are cut.
        exchange: Name of the context parallel exchange.
        data_rank: This rank's data rank, and the number of data ranks.
    """

    tp: Axis = SINGLE
    cp: Axis = SINGLE
    exchange: Exchange = "auto"
    data_rank: tuple[int, int] = (0, 1)


def read_batch(
    config: MoEConfig,
    axes: BatchAxes,
    num_microbatches: int,
    *,
    input_ids: Tensor,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    loss_weights: Tensor | None = None,
    keep_all: bool = False,
    rows_before: int = 0,
) -> CausalLMBatch:
    """Reads the tensors that :meth:`.causal_lm.MoECausalLM.forward` has as arguments.

    Args:
        config: The model's configuration.
        axes: The axes over which rows are cut and tokens spread.
        num_microbatches: Number of micro-batches, M.
        input_ids: Token ids, ``[B, S]``.
        labels: Labels at the positions of ``input_ids``, ``[B, S]``, or None.
        attention_mask: Mask, ``[B, S]``, 0 for padding, or None; see :func:`~.masks.read_mask`.
        position_ids: Positions, ``[B, S]`` or ``[1, S]``, or None.
        document_ids: Document of each token, ``[B, S]``, or None.
        loss_weights: Weight of each label, ``[B, S]``, or None.
        keep_all: Whether the output of every position is needed, padding included.
        rows_before: Number of rows of this data rank's batch that come before these.
    """
    check_shapes(
        input_ids, labels=labels, attention_mask=attention_mask, position_ids=position_ids, document_ids=document_ids,
        loss_weights=loss_weights,
    )  # fmt: skip
    input_ids, (rows, length) = input_ids.long(), input_ids.shape
    device, vocab = input_ids.device, config.vocab_size
    mask, document_ids = read_mask(attention_mask, document_ids)
    run_BS = _document_runs(document_ids, position_ids, attention_mask)
    target_BS = torch.full_like(input_ids, IGNORED)
    if labels is not None:
        target_BS = find_targets(labels, mask, document_ids, shortest_window(config))
    bad_label = (target_BS != IGNORED) & ((target_BS < 0) | (target_BS >= vocab))
    bad_token = (input_ids < 0) | (input_ids >= vocab)
    faults = F.pad(torch.stack([bad_token.sum(), bad_label.sum()]), (0, 1))
    target_BS = target_BS.masked_fill(bad_label, 0)
    token_BS = input_ids.masked_fill(bad_token, 0)
    weight_BS = torch.ones_like(target_BS, dtype=torch.float32) if loss_weights is None else shift(loss_weights, 0)
    sequence = SequenceBatch(rows, padded_length(length, axes.cp.size), tp=axes.tp, cp=axes.cp)
    sequence.num_microbatches, sequence.exchange = num_microbatches, axes.exchange
    number, ranks = axes.data_rank
    sequence.row_numbers = range(number + ranks * rows_before, ranks * (rows_before + rows), ranks)
    needed_BS, trailing = _needed(mask, None if keep_all or labels is None else target_BS)
    here = _Cut(sequence.layout, length, device)
    if run_BS is not None:
        sequence.document_BS = here.pad(run_BS, run_BS[:, -1:])
    if mask is not None and not trailing:
        sequence.real_BS = here.pad(mask, True)
    _mark_tokens(sequence, here, mask, needed_BS)
    _mark_groups(sequence, config, device)
    sequence.wants_z_loss = config.wants_z_loss
    sequence.wants_routing = config.wants_aux_loss or config.wants_z_loss
    position_BS = _positions(position_ids, run_BS if document_ids is not None else None, length, device)
    target_N = here.cut(target_BS, IGNORED).flatten()
    place_N = torch.arange(token_BS.numel(), device=device) % 8191 + 1
    return CausalLMBatch(
        token_N=here.cut(token_BS, 0).flatten(),
        sequence=sequence,
        true_length=length,
        labels=None if labels is None else torch.cat([labels[:, :1].long(), target_BS[:, :-1]], dim=1),
        target_N=target_N,
        weight_N=here.cut(weight_BS, 0).flatten(),
        labelled_index=(target_N != IGNORED).nonzero().squeeze(1),
        faults=faults.double(),
        sizes=_sizes(sequence, mask, device),
        fingerprint=((token_BS + 31 * target_BS).flatten() * place_N).sum() % PRIME,
        routing=[],
        _position_BL=here.cut(position_BS, 0),
        _config=config,
    )


class _Cut:
    """Takes this cp rank's positions of whole rows.

    Args:
        layout: Layout of the row's positions over cp.
        length: Number of positions S before padding.
        device: Device of the rows.
    """

    def __init__(self, layout: ContextLayout, length: int, device: torch.device) -> None:
        self.length, self.padding, self.device = length, layout.length - length, device
        self.index = layout.positions(device) if layout.cp.size > 1 else None

    def pad(self, x_BS: Tensor, value: Tensor | float) -> Tensor:
        """Pads whole rows at the end with ``value``."""
        if self.padding == 0:
            return x_BS
        if not isinstance(value, Tensor):
            value = x_BS.new_full((x_BS.shape[0], 1), value)
        return torch.cat([x_BS, value.expand(-1, self.padding)], dim=1)

    def cut(self, x_BS: Tensor, value: float) -> Tensor:
        """Pads whole rows and takes this rank's positions, ``[B, S] -> [B, L]``."""
        return x_BS if self.index is None else self.pad(x_BS, value).index_select(1, self.index)


def _needed(real_BS: Tensor | None, target_BS: Tensor | None) -> tuple[Tensor | None, bool]:
    """Determines what is needed of a batch; the host waits for the device once.

    Args:
        real_BS: False for padding, or None.
        target_BS: Targets, or None if the output of every position is needed.

    Returns:
        The positions whose output is needed, or None for all; and whether the causal mask suffices, because padding comes after
        every needed position.
    """
    if real_BS is None or target_BS is None:
        return None, False
    needed_BS = real_BS | (target_BS != IGNORED)
    trailing = (real_BS[:, 1:] <= real_BS[:, :-1]).all() & ~(needed_BS & ~real_BS).any()
    return needed_BS, bool(trailing)


def _filled(value: int, device: torch.device) -> Tensor:
    """Creates a number on the device, because copying it from the host would wait for the device."""
    return torch.full((), value, dtype=torch.int64, device=device)


def stand_in(
    config: MoEConfig, axes: BatchAxes, num_microbatches: int, device: torch.device, error: ValueError
) -> CausalLMBatch:
    """Makes a batch without labels for a rank whose batch cannot be read, so that it takes part until all ranks raise."""
    input_ids = torch.zeros(num_microbatches, 2, dtype=torch.int64, device=device)
    batch = read_batch(config, axes, num_microbatches, input_ids=input_ids)
    batch.error = BatchError(str(error))
    batch.error.__cause__ = error
    batch.faults[2] = 1
    return batch


def empty_batch(config: MoEConfig, axes: BatchAxes, like: Tensor) -> CausalLMBatch:
    """Makes a micro-batch of one row in which no token counts, for a rank with fewer rows than micro-batches.

    Args:
        config: The model's configuration.
        axes: See :func:`read_batch`.
        like: Token ids that give shape and device, ``[B, S]``.
    """
    token_1S = torch.zeros_like(like[:1])
    labels = torch.full_like(token_1S, IGNORED)
    batch = read_batch(config, axes, 1, input_ids=token_1S, labels=labels, attention_mask=token_1S)
    batch.labels, batch.is_empty = None, True
    return batch


def check_shapes(input_ids: Tensor, **others: Tensor | None) -> None:
    """Raises a ValueError unless the arguments of a forward pass have the right dtypes and matching shapes."""
    if input_ids.dim() != 2 or not _is_whole(input_ids):
        raise InputError(
            f"input_ids must be integers of shape [rows, length], not {input_ids.dtype} {list(input_ids.shape)}."
        )
    if not input_ids.numel():
        raise InputError(
            f"input_ids of shape {list(input_ids.shape)} holds no token; give every rank rows in every batch."
        )
    for name, tensor in others.items():
        if tensor is None or tensor.shape == input_ids.shape:
            continue
        if name == "position_ids" and tuple(tensor.shape) in ((1, input_ids.shape[1]), (input_ids.shape[1],)):
            continue
        raise InputError(
            f"{name} has shape {list(tensor.shape)}, but input_ids has {list(input_ids.shape)}; make them equal."
        )
    check_kinds({name: tensor for name, tensor in others.items() if name != "loss_weights"})


def check_kinds(tensors: Mapping[str, Tensor | None]) -> None:
    """Raises a ValueError unless labels, masks, positions and documents are integers; a mask may be bool."""
    for name, tensor in tensors.items():
        if tensor is None or _is_whole(tensor) or (name == "attention_mask" and tensor.dtype == torch.bool):
            continue
        hint = ": 1 for tokens and 0 for padding; masks that are added to scores are not read" if "mask" in name else ""
        raise InputError(f"{name} has the dtype {tensor.dtype}; give integers{hint}.")


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def label_weight(batch: Mapping[str, Tensor | None], window: int | None) -> Tensor:
    """Sums the weights of the labels that count in a loss; returns a float64 scalar.

    Args:
        batch: Mapping with ``labels`` and optionally ``attention_mask``, ``document_ids`` and ``loss_weights``, each
            ``[B, S]``.
        window: Shortest attention window of any layer; see :func:`~.masks.shortest_window`.

    Raises:
        ValueError: See :func:`~.masks.find_targets`.
    """
    labels, weights = batch["labels"], batch.get("loss_weights")
    assert labels is not None
    real_BS = find_targets(labels, batch.get("attention_mask"), batch.get("document_ids"), window) != IGNORED
    weight_BS = real_BS if weights is None else shift(weights, 0) * real_BS
    return weight_BS.double().sum()


def _document_runs(
    document_ids: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Returns the number of each token's document, or None if each row is one document."""
    if document_ids is not None:
        starts = document_ids[:, 1:] != document_ids[:, :-1]
    elif position_ids is not None and attention_mask is None:
        position_BS = position_ids.view(-1, position_ids.shape[-1])
        starts = position_BS[:, 1:] != position_BS[:, :-1] + 1
    else:
        return None
    if not bool(starts.any()):
        return None
    return F.pad(starts, (1, 0)).cumsum(1)


def _positions(position_ids: Tensor | None, run_BS: Tensor | None, length: int, device: torch.device) -> Tensor:
    if position_ids is not None:
        return position_ids.view(-1, length)
    place_1S = torch.arange(length, device=device).unsqueeze(0)
    if run_BS is None:
        return place_1S
    begins = torch.cat([torch.ones_like(run_BS[:, :1]), run_BS[:, 1:] - run_BS[:, :-1]], dim=1).bool()
    start_BS = torch.where(begins, place_1S, 0).cummax(dim=1).values
    return place_1S - start_BS


def _mark_tokens(sequence: SequenceBatch, here: _Cut, mask: Tensor | None, needed_BS: Tensor | None) -> None:
    """Marks which of this rank's tokens are routed, and which are counted.

    Padding whose output is not needed is not routed, which does not change the result and saves the experts' work.
    """
    device = here.device
    true_BS = torch.ones(sequence.rows, here.length, dtype=torch.bool, device=device)
    if sequence.padding or here.padding or needed_BS is not None:
        routed_BL = here.cut(true_BS if needed_BS is None else needed_BS, False)
        sequence.routed_T = sequence.shard(routed_BL.flatten(), value=False)
        sequence.num_routed = int(sequence.routed_T.sum())
    if sequence.padding or here.padding or mask is not None:
        counted_BL = here.cut(true_BS if mask is None else mask, False)
        sequence.counted_T = sequence.shard(counted_BL.flatten(), value=False)


def _mark_groups(sequence: SequenceBatch, config: MoEConfig, device: torch.device) -> None:
    """Numbers the groups of this rank's tokens within which the load-balancing loss is computed."""
    if config.aux_loss == "global_batch":
        return
    groups = sequence.rows if config.aux_loss == "sequence" else sequence.num_microbatches
    if groups > 1:
        most, larger = max(even_split(sequence.rows, groups)), sequence.rows % groups or groups
        # If the rows do not divide evenly, the first groups have one row more.
        row_B = torch.arange(sequence.rows, device=device)
        rest_B = larger + (row_B - larger * most) // max(most - 1, 1)
        group_B = torch.where(row_B < larger * most, row_B // most, rest_B)
        sequence.group_T, sequence.num_groups = sequence.shard(group_B.repeat_interleave(sequence.length)), groups


def _sizes(sequence: SequenceBatch, mask: Tensor | None, device: torch.device) -> Tensor:
    counted_T = sequence.counted_T
    tokens = _filled(sequence.tokens // sequence.tp.size, device) if counted_T is None else counted_T.sum()
    rows = _filled(sequence.rows, device) if mask is None else mask.bool().any(1).sum()
    return torch.stack([tokens, rows]).double()
