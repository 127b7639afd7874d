# SPDX-License-Identifier: Apache-2.0
"""``lm-eval`` on a model under a fold: its tasks and metrics, our logits.

Every rank runs the evaluation with all requests; those of a kind are sorted by length and dealt to the data ranks, and what
these find is summed or gathered. So every rank has every result, and calls the model as often as its peers. The rules (how a
context and a continuation are encoded, cut and scored) are those of lm-eval's own ``hf``.

Legend: N requests, R rows of a call, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import SINGLE
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import IGNORED
from lightning_moefold.models.generation import StopStrings
from lightning_moefold.recipes.preference import log_probabilities, sum_over_ranks

_SAMPLED = {"do_sample", "temperature", "top_k", "top_p"}


class FoldLM(TemplateLM):
    """A model under its fold, as lm-eval sees it.

    Args:
        model: The model; all ranks evaluate it together.
        tokenizer: Of ``transformers``.
        batch_size: Rows of a call on each data rank.
        name: What the tokenizer is called in results.
    """

    def __init__(self, model: MoECausalLM, tokenizer: Any, batch_size: int, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self._name = model, tokenizer, batch_size, name
        self.max_length = int(model.config.raw.get("max_position_embeddings") or 2048)
        mesh = model.mesh
        self._data_rank, self._data_ranks = (0, 1) if mesh is None else (mesh.place["dp"], mesh.fold.dp)
        self._here = next(model.parameters()).device

    # ---- tokens ------------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """What the tokenizer is called in results."""
        return self._name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; a begin-of-text token that the text has already is not added."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    # ---- scores ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the most probable one. Collective."""
        rows: list[tuple[list[int], int]] = []
        for _text, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens; the model knows {self.max_length} positions."
                )
            rows.append(((context + continuation)[-(self.max_length + 1) :], len(continuation)))
        table_N2 = torch.zeros(len(rows), 2, dtype=torch.float64, device=self._here)
        order = sorted(range(len(rows)), key=lambda n: (-len(rows[n][0]), n))
        with torch.no_grad():
            for batch in self._dealt(order):
                self._score(rows, batch, len(rows[batch[0]][0]), table_N2)
        found = sum_over_ranks(self.model, table_N2).tolist()
        return [(score, bool(greedy)) for score, greedy in found]

    def _dealt(self, order: list[int]) -> list[list[int]]:
        """Requests of each call over all data ranks; the longest is the first."""
        size = self.batch_size * self._data_ranks
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _mine(self, batch: list[int]) -> list[int]:
        return batch[self._data_rank :: self._data_ranks]

    def _score(self, rows: list[tuple[list[int], int]], batch: list[int], length: int, table_N2: Tensor) -> None:
        mine = self._mine(batch)
        ids_RS = torch.zeros(max(len(mine), 1), length, dtype=torch.int64)
        mask_RS, labels_RS = torch.zeros_like(ids_RS), torch.full_like(ids_RS, IGNORED)
        for row, number in enumerate(mine):
            tokens, size = rows[number]
            ids_RS[row, : len(tokens)], mask_RS[row, : len(tokens)] = torch.tensor(tokens), 1
            labels_RS[row, len(tokens) - size : len(tokens)] = ids_RS[row, len(tokens) - size : len(tokens)]
        place_R = torch.tensor(mine or [-1])

        def note(logits: Tensor, labels: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
            sum_R, count_R = log_probabilities(logits, labels)
            if mine:  # otherwise the only row is nobody's
                right_RS = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
                table_N2[place] = torch.stack([sum_R.double(), right_RS.all(1).double()], dim=1)
            return sum_R.sum(), count_R.sum()

        inputs = {"input_ids": ids_RS, "labels": labels_RS, "attention_mask": mask_RS, "place": place_R}
        self.model(**{name: x.to(self._here) for name, x in inputs.items()}, loss_fn=note)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the positions that the model knows. Collective."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            ):  # fmt: skip
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        return sums

    # ---- generation --------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, until a stop string. Collective."""
        texts: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        for numbers in kinds.values():
            options = normalize_gen_kwargs(dict(requests[numbers[0]].args[1]), 256)
            until = handle_stop_sequences(options.pop("until", None), self.tokenizer.decode([self.eot_token_id]))
            new = int(options.pop("max_gen_toks"))
            if new >= self.max_length:
                raise InputError(f"a task asks for {new} new tokens, but the model knows {self.max_length} positions.")
            if unknown := set(options) - _SAMPLED:
                raise InputError(f"a task generates with {', '.join(sorted(unknown))}, which generate does not have.")
            sampled: dict[str, Any] = dict(options) if options.get("do_sample") else {}
            encoded = {n: self.tok_encode(requests[n].args[0])[-(self.max_length - new) :] for n in numbers}
            for batch in self._dealt(sorted(numbers, key=lambda n: (-len(encoded[n]), n))):
                mine = self._mine(batch)
                for number, text in zip(mine, self._say([encoded[n] for n in mine], new, sampled, until), strict=True):
                    texts[number] = text
        everyone = comm.all_gather_objects(texts, SINGLE if self.model.mesh is None else self.model.mesh.world)
        said = {number: text for found in everyone for number, text in found.items()}
        return [said[number] for number in range(len(requests))]

    def _say(self, prompts: list[list[int]], new: int, sampled: dict[str, Any], until: list[str]) -> list[str]:
        length = max(map(len, prompts), default=1)
        ids_RS = torch.full((len(prompts), length), self.eot_token_id)
        mask_RS = torch.zeros_like(ids_RS)
        for row, tokens in enumerate(prompts):
            ids_RS[row, length - len(tokens) :], mask_RS[row, length - len(tokens) :] = torch.tensor(tokens), 1
        stop = StopStrings(tuple(filter(None, until)), self.tokenizer)  # with the tokenizer's end of text
        out = self.model.generate(
            ids_RS.to(self._here), mask_RS.to(self._here), max_new_tokens=new, pad_token_id=self.eot_token_id,
            stop_strings=stop.texts, tokenizer=self.tokenizer, **sampled,
        )  # fmt: skip
        return [postprocess_generated_text(stop.cut(tokens), until, None) for tokens in out[:, length:].tolist()]
