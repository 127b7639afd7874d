# SPDX-License-Identifier: Apache-2.0
"""MoECausalLM: a Mixtral, Qwen2-MoE or Qwen3-MoE language model that computes the same under every fold.

Legend: B rows, S positions, N = B * S tokens, T tokens of this tp rank, D hidden size, V vocabulary, M micro-batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_moefold import comm
from lightning_moefold.errors import InputError, InputTypeError
from lightning_moefold.models.batch import BatchAxes, CausalLMBatch, read_batch, stand_in
from lightning_moefold.models.config import MoEConfig
from lightning_moefold.models.generation import Sampling, StopStrings, generate
from lightning_moefold.models.join import JoinCalls
from lightning_moefold.models.losses import GlobalLoss, Losses, StepLabels
from lightning_moefold.models.pretrained import PretrainedModel
from lightning_moefold.modules import Attention, DecoderLayer, GatedMLP, MoELayer, RMSNorm
from lightning_moefold.modules.attention.exchanges import Exchange
from lightning_moefold.modules.attention.kv_cache import KeyValueCache
from lightning_moefold.modules.base import wide
from lightning_moefold.modules.vocabulary import VocabularyEmbedding, VocabularyHead

LossFunction = Callable[..., tuple[Tensor, Tensor]]


class CausalLMOutput(NamedTuple):
    """The result of a forward pass.

    It is a tuple, because FSDP2 (in torch 2.11) finds the tensors in tuples but not in dataclasses.

    Attributes:
        loss: Language-model loss plus weighted auxiliary losses over the *global* batch, bit-identical on every rank.
            None without labels.
        lm_loss: Mean loss of all label tokens on all ranks.
        aux_loss: Unweighted load-balancing loss. None unless ``output_router_logits`` is on, or ``aux_loss`` is one
            that ``transformers`` does not have.
        logits: Logits, ``[B, S, V]``; None if this rank does not hold them (see :meth:`MoECausalLM.forward`).
        z_loss: Unweighted z-loss of the routers; None without ``router_z_loss_coef``.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    z_loss: Tensor | None = None


class Decoder(nn.Module):
    """Embedding, decoder layers and final norm. A layer's name is its number in the whole model."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.embed_tokens = VocabularyEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleDict({str(i): make_layer(config, i) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: CausalLMBatch) -> Tensor:
        """Returns the hidden states after the final norm, ``[T, D]``."""
        x_TD = self.embed_tokens(batch.token_N, batch.sequence)
        batch.set_rotary_tables(x_TD.dtype)
        for layer in self.layers.values():
            output = layer(x_TD, batch.sequence)
            if isinstance(output, tuple):
                x_TD, table_SE = output
                batch.routing.append(table_SE)
            else:
                x_TD = output
        return self.norm(x_TD)


def make_layer(config: MoEConfig, index: int) -> DecoderLayer:
    """Makes layer ``index`` of a model, on the default device."""
    attention = Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        sliding_window=config.sliding_windows[index],
        rope_theta=config.rope_theta,
    )
    mlp: MoELayer | GatedMLP
    if config.is_moe_layer(index):
        router = config.router
        if router.norm_topk_prob is None and not router.softmax_after_topk:
            router = replace(router, norm_topk_prob=config.norm_topk_prob)
        mlp = MoELayer(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.packed_widths[index] if config.packed_widths else config.moe_intermediate_size,
            router=router,
            shared_ffn_hidden_size=config.shared_width(index),
            activation=config.hidden_act,
        )
        mlp.gate.layer = index
    else:
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
    return DecoderLayer(config.hidden_size, attention, mlp, config.rms_norm_eps)


class MoECausalLM(PretrainedModel):
    """A decoder-only MoE language model.

    In one process it is an ordinary module. If it is made in a LightningModule's ``configure_model`` under
    :class:`~lightning_moefold.MoEFoldStrategy`, its parameters have no storage at first, and each rank then reads only
    its own slices.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = VocabularyHead(config.vocab_size, config.hidden_size, tied)
        self.num_microbatches = 1
        self.step_labels: Callable[[], StepLabels] | None = None  # while one of several batches of a step is trained on
        #: Takes the arguments of a call where the layers lie on several pipeline ranks (:mod:`.parallel.pipeline`).
        self.pipeline: Any = None
        self.context_parallel_exchange: Exchange = "auto"
        biased = config.router.bias_update_rate is not None  # instead of the loss
        if config.router_aux_loss_coef > 0 and not config.wants_aux_loss and config.num_moe_layers and not biased:
            warnings.warn(
                f"router_aux_loss_coef={config.router_aux_loss_coef} has no effect because output_router_logits is off, as "
                "in transformers; pass output_router_logits=True to train with the load-balancing loss.",
                stacklevel=3,
            )

    # ---- the fold ----------------------------------------------------------------------------------------------

    def units(self) -> list[nn.Module]:
        """Returns the modules to shard: the layers, then the model with its remaining parameters (embedding, final norm, head)."""
        return [*self.model.layers.values(), self]

    def use(self, settings: Any) -> None:
        """See :class:`~lightning_moefold.modules.base.ParallelRoot`."""
        super().use(settings)
        self.num_microbatches, self.context_parallel_exchange = settings.num_microbatches, settings.exchange
        if self.pipeline is not None:
            self.pipeline.runner.use(settings.plan)

    def moe_layers(self) -> dict[int, MoELayer]:
        """Returns the MoE layers on this rank, by their number in the whole model."""
        return {int(i): m.mlp for i, m in self.model.layers.items() if isinstance(m.mlp, MoELayer)}

    # ---- running -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        loss_fn: LossFunction | None = None,
        gather_logits: bool = False,
        last_logits: bool = False,
        cache: KeyValueCache | None = None,
        **extras: Any,
    ) -> CausalLMOutput:
        """Runs the model on this data rank's rows. Collective: all ranks call it together.

        Args:
            input_ids: Token ids, ``[B, S]``, int64.
            labels: Labels, ``[B, S]``, at the positions of ``input_ids``; the model shifts them, and -100 is ignored.
            attention_mask: ``[B, S]`` integers or bool, 0 for padding; numbers above 1 number documents and replace
                ``document_ids``.
            position_ids: Positions, ``[B, S]`` or ``[1, S]``; 0, 1, ... by default. Without mask and document ids, a
                new document begins where positions do not increase by 1, as in ``transformers``.
            document_ids: Document of each token, ``[B, S]``; attention and positions restart where it changes, and no
                label crosses the border.
            loss_weights: Weight of each label, ``[B, S]``, at the positions of ``labels``; the loss is then ``sum(w *
                l) / sum(w)``.
            loss_fn: ``loss_fn(logits, labels, **extras) -> (sum, weight)`` replaces cross-entropy and gets whole logits
                ``[B, S, V]``; the loss is the sum over all ranks divided by the weight over all ranks. Its labels are those
                of whole rows, -100 too where the model's own loss counts none: across the border of documents, and
                after padding that sees no token.
            gather_logits: Whether to return whole logits on every rank, even with tensor parallelism and with labels.
            last_logits: Whether to return the logits of the last position only, ``[B, 1, V]``, on every rank.
            cache: Keys and values of the positions before ``input_ids``; those of ``input_ids`` are added, and
                ``last_logits`` is true. Used by :meth:`generate` where rows are not cut and layers are on one rank.
            **extras: Further arguments of ``loss_fn``; without a ``loss_fn`` they are an error.

        Returns:
            The losses if there are labels; the logits with ``gather_logits``, or if there are no labels and tp is 1.

        Raises:
            ValueError: If shapes disagree, a mask holds floats or negative numbers, or a token id or label lies outside the
                vocabulary on any rank (raised on all).
            TypeError: If an argument is unknown and there is no ``loss_fn``.
        """
        if extras and loss_fn is None:
            raise InputTypeError(
                f"MoECausalLM.forward got an unexpected argument {next(iter(extras))!r}; only a loss_fn takes extras."
            )
        if self.training and torch.is_grad_enabled() and (labels is not None or loss_fn is not None):
            self.check_trainable(self.adapter is not None)
        tensors: dict[str, Any] = {
            "input_ids": input_ids, "labels": labels, "attention_mask": attention_mask, "position_ids": position_ids,
            "document_ids": document_ids, "loss_weights": loss_weights,
        }  # fmt: skip
        if self.pipeline is not None:
            return self.pipeline(tensors, loss_fn, gather_logits, last_logits, extras)
        axes = self.batch_axes()
        try:
            self.note_trained()
            keep_all = gather_logits or loss_fn is not None
            batch = read_batch(self.config, axes, self.num_microbatches, keep_all=keep_all, **tensors)
        except ValueError as error:  # raised below, on all ranks together
            batch = stand_in(self.config, axes, self.num_microbatches, input_ids.device, error)
            cache = None
        batch.sequence.cache, batch.sequence.call = cache, self.next_call()
        batch.sequence.adapter_call = self.next_adapter_call()
        batch.last_only = last_logits or cache is not None
        with torch.autocast(input_ids.device.type, enabled=False):
            x_ND = batch.sequence.gather(self.model(batch))
            wants_logits = gather_logits or batch.last_only or (labels is None and self.tp.size == 1)
            logits = self.whole_logits(x_ND, batch) if wants_logits or loss_fn else None
            local = self.local_loss(x_ND, logits, batch, loss_fn, extras)
            step = self.take_step_labels(labels, loss_fn)
            losses = GlobalLoss(self.config, self.mesh, wide(x_ND.dtype), step).reduce(local, batch)
        return self.make_output(losses, logits if wants_logits else None, labels is not None)

    def note_trained(self) -> None:
        """Remembers, before a training pass, which parameters train beside an adapter.

        Raises:
            InputError: If they cannot; the caller lets all ranks know, since another stage may hold other parameters.
        """
        if self.adapter is not None and self.training and torch.is_grad_enabled():
            self.adapter.note_trained(self)

    def batch_axes(self) -> BatchAxes:
        """The axes over which batches are spread."""
        if self.mesh is None:
            return BatchAxes()
        data_rank = self.mesh.place["dp"], self.mesh.fold.dp
        return BatchAxes(self.tp, self.mesh.axis("cp"), self.context_parallel_exchange, data_rank)

    def take_step_labels(self, labels: Tensor | None, loss_fn: LossFunction | None) -> StepLabels | None:
        """Returns the label weights of the optimizer step, if the training loss is divided by them; None otherwise.

        Raises:
            ValueError: If a ``loss_fn`` is given.
        """
        if self.step_labels is None or labels is None or not torch.is_grad_enabled():
            return None
        if loss_fn is not None:
            raise InputError(
                "calculate_per_token_loss=True must know the weight of each accumulated batch before the first of them is "
                "computed, but a loss_fn returns it afterwards; set it to False, or use loss_weights instead of a loss_fn."
            )
        return self.step_labels()

    def next_call(self) -> Tensor | None:
        """Returns the number of this call for routers with noise, the same for all micro-batches; None if no router has noise."""
        calls = [layer.gate.next_call() for layer in self.moe_layers().values()]
        return next((call for call in calls if call is not None), None)

    def next_adapter_call(self) -> Tensor | None:
        """Returns the number of this call for the dropout of an adapter; None if there is none."""
        layers = [layer for layer in self.model.layers.values() if isinstance(layer, DecoderLayer)]
        return next((call for call in [layer.next_adapter_call() for layer in layers] if call is not None), None)

    def whole_logits(self, x_ND: Tensor, batch: CausalLMBatch) -> Tensor:
        """Logits of whole rows, ``[B, S, V]``, on every rank of a data replica; cp ranks' gradients are summed.

        Or those of the last position only, without gradients.
        """
        rows, layout = batch.sequence.rows, batch.sequence.layout
        if batch.last_only:
            holder, place = layout.find(batch.true_length - 1)
            x_BD = x_ND.detach().view(rows, batch.sequence.length, -1)[:, place]
            x_BD = comm.all_gather_raw(x_BD, layout.cp).unflatten(0, (layout.cp.size, rows))[holder]
            return self.lm_head.logits(x_BD).unsqueeze(1)
        logits_BLV = self.lm_head.logits(x_ND).view(rows, batch.sequence.length, -1)
        if layout.cp.size == 1:
            return logits_BLV
        logits_SBV = comm.all_gather(logits_BLV.transpose(0, 1).contiguous(), layout.cp)
        return logits_SBV.index_select(0, layout.order(x_ND.device)[: batch.true_length]).transpose(0, 1)

    def local_loss(
        self,
        x_ND: Tensor,
        logits: Tensor | None,
        batch: CausalLMBatch,
        loss_fn: LossFunction | None,
        extras: dict[str, Any],
    ) -> tuple[Tensor, Tensor] | None:
        """Returns this data rank's sum of losses and sum of weights; None without labels."""
        if batch.labels is None:
            return None
        if loss_fn is not None:
            total, weight = loss_fn(logits, batch.labels, **extras)
            total = total.to(wide(total.dtype))
            weight = torch.as_tensor(weight, device=total.device, dtype=torch.float64).detach()
            # All cp ranks have computed the same sum, and gradients are summed over them, so each takes an equal share.
            return total / batch.sequence.layout.cp.size, weight / batch.sequence.layout.cp.size
        labelled = batch.labelled_index
        weight_N = batch.weight_N[labelled].to(wide(x_ND.dtype))
        total = self.lm_head.cross_entropy(x_ND.index_select(0, labelled), batch.target_N[labelled], weight_N)
        return total, weight_N.sum()

    def make_output(self, losses: Losses, logits: Tensor | None, labelled: bool) -> CausalLMOutput:
        """Adds up the losses with their coefficients."""
        if not labelled or losses.lm is None:
            return CausalLMOutput(aux_loss=losses.aux, logits=logits, z_loss=losses.z)
        loss = losses.lm
        for coefficient, term in (
            (self.config.router_aux_loss_coef, losses.aux), (self.config.router_z_loss_coef, losses.z)
        ):  # fmt: skip
            loss = loss if term is None else loss + coefficient * term
        return CausalLMOutput(loss, losses.lm, losses.aux, logits, losses.z)

    def stand_in(self) -> None:
        """Takes part in a call of ranks that have data, with rows in which no token counts. Collective."""
        token_M1 = torch.zeros(self.num_microbatches, 1, dtype=torch.int64, device=next(self.parameters()).device)
        self(token_M1, labels=torch.full_like(token_M1, -100), attention_mask=torch.zeros_like(token_M1))

    def unequal_calls(self) -> AbstractContextManager[Any]:
        """Returns a context in which ranks may call this model a different number of times, without gradients.

        Collective: every rank enters and leaves it; leaving waits for the ranks that still call. Inside another such
            context, for example that of ``Trainer.predict``, it has no effect.
        """
        return JoinCalls([self]) if self.unequal is None else nullcontext()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
    ) -> Tensor:
        """Continues prompts, like the method of this name in ``transformers``. Collective: all ranks call it together.

        Each data rank passes its own prompts, any number of them or none; the ranks of its replica (tp, cp and pp) pass
        the same ones. During the call the model is in evaluation mode, without gradients. Keys and values are cached
        unless rows are cut over cp or layers over pp; there each new token takes a pass over whole rows.

        Args:
            input_ids: Prompts, ``[B, S]``, shorter ones padded on the left.
            attention_mask: ``[B, S]``, 0 for padding. Without it, ``pad_token_id`` marks padding, unless it is also an
                end-of-text token.
            max_new_tokens: Maximum number of tokens to add.
            do_sample: Whether to draw the next token instead of taking the most probable one. Without it, the next
                three arguments and ``seed`` have no effect.
            temperature: Divides the logits.
            top_k: Number of most probable tokens to draw from.
            top_p: Draw from the smallest set of most probable tokens whose total probability reaches this value.
            eos_token_id: One or several tokens that end a text; by default the checkpoint's, ``()`` for none.
            pad_token_id: Token that fills a row after its end of text; by default the checkpoint's, otherwise the first
                ``eos_token_id``.
            seed: Seed of the draws. Row b of data rank r of R draws the numbers of row ``b * R + r``, so prompts dealt
                in turn to the data ranks get the same texts under every fold. By default torch's generator gives the
                seed.
            stop_strings: A text ends, too, with the token that completes one of these, special tokens included.
            tokenizer: Decodes tokens; ``stop_strings`` need it.

        Returns:
            Prompts and new tokens, ``[B, S + new]``, where ``new`` is the length of this rank's longest new text; equal
            on all ranks of a replica.

        Raises:
            ValueError: If a prompt is empty, padded on the right, longer than ``max_position_embeddings`` or holds a
                token outside the vocabulary, or an argument is out of range.
            PeerError: If another rank raised such an error.
        """
        sampling = Sampling(temperature, top_k, top_p, seed) if do_sample else None
        stop = StopStrings(tuple(stop_strings), tokenizer)
        return generate(self, input_ids, attention_mask, max_new_tokens, sampling, eos_token_id, pad_token_id, stop)
