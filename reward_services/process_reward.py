"""A reward model from Hugging Face, read at the end of each span: one pass for all of a rollout.

What cannot be such a model is a UserError when it is loaded. A model that sees later tokens
reads the text up to a span's end anew for each span. Shapes: B rows, L tokens, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from grpo.errors import UserError
from reward_services.asked_rollouts import AskedRollout, AskedRollouts
from reward_services.model_config import Activation, ProcessRewardConfig
from reward_services.token_rows import device_of, padded, passes
from reward_services.user_functions import Verdict

_SUFFIX = {"token_classification": "ForTokenClassification", "reward": "ForSequenceClassification"}
_CLASSES: dict[str, Any] = {
    "token_classification": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """Tokens of one pass, and at which of them the model is read for each end of a span."""

    ids: Tensor  # [L]
    reads: dict[int, int]  # tokens of the rollout -> place in ids


class ProcessReward:
    """Owns the model and its tokenizer."""

    def __init__(self, config: ProcessRewardConfig) -> None:
        self._config = config
        self._device = device_of(config.device)
        self._model, self._tokenizer = _loaded(config)
        self._model.to(self._device).eval()
        self._weights = _label_weights(config, self._model.config)  # [K]
        self._activation = _activation(config, self._model.config)
        self._is_causal = self._sees_no_later_token()
        if config.head == "token_classification" and not self._is_causal:
            raise _misfit(config, "it sees later tokens, so a step's score would depend on them")
        self._max_tokens = getattr(self._model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def verdicts(self, asked: AskedRollouts) -> list[Verdict]:
        """One verdict per span, in the order of the batch."""
        rows, owners = [], []
        for number, rollout in enumerate(asked.rollouts):
            for row in self._rows(rollout):
                rows.append(row)
                owners.append(number)
        found: list[dict[int, Verdict]] = [{} for _ in asked.rollouts]
        for number, verdicts in zip(owners, self._read(rows), strict=True):
            found[number] |= verdicts
        nothing = Verdict(value=None)  # no text to judge: the model does not apply
        return [
            found[number].get(asked.rollouts[number].spans[place][1], nothing)
            for number, place in asked.places
        ]

    def _rows(self, rollout: AskedRollout) -> list[_Row]:
        if self._is_causal:
            return [self._whole_row(rollout)]
        ends = sorted({end for _, end in rollout.spans if end})
        return [self._cut_row(rollout, end) for end in ends]

    def _whole_row(self, rollout: AskedRollout) -> _Row:
        """The question, then every step with its separator, each tokenised for itself."""
        ids, reads, before = self._question(rollout.prompt), {}, 0
        first = len(ids)
        for end, character in zip(rollout.boundaries, rollout.characters, strict=True):
            piece = rollout.text[before:character]
            if self._config.separator:
                piece = piece.rstrip()
            ids += self._encoded(piece) + self._encoded(self._config.separator)
            before = character
            if len(ids) > first:
                reads[end] = len(ids) - 1
        return _Row(ids=torch.tensor(ids), reads=reads)

    def _cut_row(self, rollout: AskedRollout, end: int) -> _Row:
        """Question and answer as a pair, as encoders are trained; read as a whole."""
        text = rollout.text[: rollout.characters[rollout.boundaries.index(end)]]
        ids = self._tokenizer(rollout.prompt, text)["input_ids"]
        return _Row(ids=torch.tensor(ids), reads={end: len(ids) - 1})

    def _question(self, prompt: str) -> list[int]:
        if self._config.prompt == "chat":
            prompt = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            return self._encoded(prompt)
        start = self._tokenizer.bos_token_id
        return [*([] if start is None else [start]), *self._encoded(prompt)]

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _read(self, rows: Sequence[_Row]) -> list[dict[int, Verdict]]:
        """For each row a verdict by the end of a span."""
        lengths = [len(row.ids) for row in rows]
        found: list[dict[int, Verdict]] = [self._too_long(row) for row in rows]
        fitting = [place for place, row in enumerate(rows) if not found[place] and row.reads]
        budget = self._config.max_tokens_per_pass
        for part in passes([lengths[place] for place in fitting], at_most=budget):
            places = [fitting[number] for number in part]
            outputs = self._outputs([rows[place] for place in places])
            for place, output in zip(places, outputs, strict=True):
                values = self._scores(output).tolist()
                found[place] = dict(zip(rows[place].reads, map(_verdict, values), strict=True))
        return found

    def _too_long(self, row: _Row) -> dict[int, Verdict]:
        if self._max_tokens is None or len(row.ids) <= self._max_tokens:
            return {}
        failure = (
            f"the answer and its question are {len(row.ids)} tokens; {self._config.model} reads "
            f"{self._max_tokens} at most"
        )
        return dict.fromkeys(row.reads, Verdict(value=None, failure=failure))

    def _outputs(self, rows: Sequence[_Row]) -> list[Tensor]:
        """For each row [number of its reads, K] in float32 on the CPU."""
        ids, mask = padded([row.ids for row in rows], self._device)
        if not self._is_causal:
            logits = self._model(input_ids=ids, attention_mask=mask).logits  # [B, K]
            return list(logits.float().cpu()[:, None])
        if self._config.head == "reward":
            states = self._states(ids, mask)
            read = [states[place, list(row.reads.values())] for place, row in enumerate(rows)]
            return [self._model.score(part).float().cpu() for part in read]
        logits = self._model(input_ids=ids, attention_mask=mask).logits  # [B, L, K]
        return [
            logits[place, list(row.reads.values())].float().cpu() for place, row in enumerate(rows)
        ]

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self._model.base_model(
            input_ids=ids, attention_mask=mask
        ).last_hidden_state
        return states  # [B, L, H]

    def _scores(self, output: Tensor) -> Tensor:
        """[reads, K] to [reads]."""
        if self._activation == "softmax":
            output = output.softmax(-1)
        elif self._activation == "sigmoid":
            output = output.sigmoid()
        return output @ self._weights

    @torch.inference_mode()
    def _sees_no_later_token(self) -> bool:
        """Whether other last tokens leave the states before them as they are."""
        # Not the lowest ids, which may be padding and so be left out.
        last = int(self._model.config.vocab_size) - 1
        ids = torch.tensor([[last - 1, last - 2, last], [last - 1, last - 2, last - 3]])
        states = self._states(ids.to(self._device), torch.ones_like(ids).to(self._device)).float()
        return torch.allclose(states[0, 0], states[1, 0], atol=1e-3, rtol=1e-3)


def _loaded(config: ProcessRewardConfig) -> tuple[Any, Any]:
    transformers_logging.disable_progress_bar()
    try:
        architectures = AutoConfig.from_pretrained(config.model).architectures or ["nothing"]
        if not any(name.endswith(_SUFFIX[config.head]) for name in architectures):
            raise _misfit(config, f"it holds {', '.join(architectures)}")
        model, report = _CLASSES[config.head].from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError, KeyError) as error:
        raise _misfit(config, f"transformers cannot load it: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise _misfit(config, f"its weights lack {missing}, which would be random")
    if config.head == "reward" and not hasattr(model, "score") and model.config.is_decoder:
        raise _misfit(config, "its head is not called score, so it cannot be read at each step")
    if config.separator and not tokenizer.encode(config.separator, add_special_tokens=False):
        raise _misfit(config, f"its tokenizer makes no token of separator {config.separator!r}")
    return model, tokenizer


def _label_weights(config: ProcessRewardConfig, facts: Any) -> Tensor:
    """How much of each output is in the score. [K]

    Labels polite, safe with label safe: 0, 1; with label_weights polite 0.2, safe 0.8: 0.2, 0.8.
    """
    names = {int(place): str(name) for place, name in facts.id2label.items()}
    wanted: dict[str | int, float] = dict(config.label_weights.items())
    if not wanted:
        alone = 0 if len(names) == 1 else None
        label = alone if config.label is None else config.label
        if label is None:
            raise _misfit(config, f"no label is set, and its labels are {_listed(names)}")
        wanted = {label: 1.0}
    weights = torch.zeros(len(names))
    for label, weight in wanted.items():
        place = next((place for place, name in names.items() if label in (place, name)), None)
        if place is None:
            raise _misfit(config, f"label is {label!r}, and its labels are {_listed(names)}")
        weights[place] = weight
    return weights


def _listed(names: dict[int, str]) -> str:
    listed = ", ".join(f"{place}: {name}" for place, name in sorted(names.items()))
    return f"{listed}: set label to one of them"


def _activation(config: ProcessRewardConfig, facts: Any) -> Activation:
    if config.activation is not None:
        return config.activation
    if facts.problem_type == "regression":
        return "none"
    if facts.problem_type == "multi_label_classification":
        return "sigmoid"
    if facts.num_labels > 1:
        return "softmax"
    return "sigmoid" if config.head == "token_classification" else "none"


def _misfit(config: ProcessRewardConfig, found: str) -> UserError:
    other = "reward" if config.head == "token_classification" else "token_classification"
    return UserError(
        f"process_reward: {config.model} does not fit: {found}; expected a causal model saved as "
        f"...{_SUFFIX[config.head]} with its tokenizer (head: {config.head}; the other: {other})"
    )


def _verdict(value: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict(value=None, failure=f"score {value}; expected a finite number")
    return Verdict(value=value)
