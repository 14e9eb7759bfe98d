"""PRIME's implicit process reward (arXiv:2502.01456): a policy that learns from outcomes alone.

    q_t = log p(token t) of the model - log p(token t) of the frozen reference

The score of a span is the sum of its q. Learning raises sigmoid(beta * sum of an answer's q) for
right answers and lowers it for wrong ones. Shapes: B rows, T tokens of a completion, H state size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from grpo.errors import UserError
from grpo.types import Int32
from reward_services.asked_rollouts import AskedRollouts, JudgedRollout
from reward_services.model_config import ImplicitRewardConfig
from reward_services.token_rows import device_of, padded, passes
from reward_services.user_functions import Verdict

_OPTIMIZER_FILE = "optimizer.pt"
_MAX_TOKENS_PER_LOGITS = 512  # [tokens, vocabulary] is the largest array of all; a slice at a time


def outcome_losses(sums: Tensor, outcomes: Tensor, *, beta: float) -> Tensor:
    """Binary cross-entropy of sigmoid(beta * sum of q) with the outcome. [B]

    Sums 0.5 and -0.2 with outcomes 1 and 0 at beta 0.05 give 0.680725 and 0.688160.
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(
        beta * sums, outcomes, reduction="none"
    )


class ImplicitReward:
    """Owns the model that learns, its optimiser and the frozen reference."""

    def __init__(self, config: ImplicitRewardConfig) -> None:
        transformers_logging.disable_progress_bar()
        self._config = config
        self._device = device_of(config.device)
        # Both in float32 and computed alike, so that q is exactly 0 before anything is learned,
        # and updates of 1e-6 are not rounded away.
        reference = config.model if config.reference is None else config.reference
        self._reference = _loaded(reference, self._device).requires_grad_(False)
        self._hold(_loaded(config.model, self._device))
        self._num_ids = int(self._reference.get_input_embeddings().weight.shape[0])
        if self._num_ids != int(self._model.get_input_embeddings().weight.shape[0]):
            raise UserError(
                f"implicit_reward: {config.model} and its reference {reference} have vocabularies "
                "of different sizes; expected two states of one model"
            )

    def verdicts(self, asked: AskedRollouts) -> list[Verdict]:
        """The sum of q over each span, in the order of the batch."""
        rows = [(rollout.context, rollout.tokens) for rollout in asked.rollouts]
        problems = [self._problem(*row) for row in rows]
        fitting = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
        with torch.no_grad():
            found = iter(self._log_ratios(fitting))
        sums = [None if problem else _running_sums(next(found)) for problem in problems]
        return [
            _verdict(sums[number], problems[number], *asked.rollouts[number].spans[place])
            for number, place in asked.places
        ]

    def learn(self, rollouts: Sequence[JudgedRollout]) -> Mapping[str, float]:
        """One or more updates on the answers of a step; raises before a step that is no number."""
        for rollout in rollouts:
            if not 0 <= rollout.outcome <= 1:
                raise ValueError(
                    f"scorer {self._config.outcome!r} gave {rollout.outcome:g}; an outcome to "
                    "learn from lies between 0 (wrong) and 1 (right)"
                )
            if problem := self._problem(rollout.context, rollout.tokens):
                raise ValueError(problem)
        size = self._config.rollouts_per_update or max(len(rollouts), 1)
        updates = [self._update(part) for part in _parts(rollouts, size)]
        count = len(rollouts)
        return {
            "num_rollouts": float(count),
            "num_updates": float(len(updates)),
            "loss": sum(u.loss for u in updates) / count if count else math.nan,
            "accuracy": sum(u.num_right for u in updates) / count if count else math.nan,
            "grad_norm": max((u.grad_norm for u in updates), default=math.nan),
        }

    def save(self, folder: str) -> None:
        """The model as Hugging Face has it, and the state of the optimiser."""
        self._model.save_pretrained(folder)
        torch.save(self._optimizer.state_dict(), Path(folder, _OPTIMIZER_FILE))

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote."""
        self._hold(_loaded(folder, self._device))
        state = torch.load(Path(folder, _OPTIMIZER_FILE), self._device, weights_only=True)
        self._optimizer.load_state_dict(state)

    def _hold(self, model: Any) -> None:
        self._model = model
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=self._config.learning_rate, weight_decay=0.0
        )

    def _problem(self, context: Int32, tokens: Int32) -> str | None:
        highest = max(int(context.max(initial=0)), int(tokens.max(initial=0)))
        if highest < self._num_ids:
            return None
        return (
            f"token {highest} is none of the {self._num_ids} of {self._config.model}; "
            "implicit_reward.model needs the policy's vocabulary"
        )

    def _update(self, rollouts: Sequence[JudgedRollout]) -> _Update:
        self._optimizer.zero_grad()
        lengths = [len(r.context) + len(r.tokens) for r in rollouts]
        loss = num_right = 0.0
        for part in passes(lengths, at_most=self._config.max_tokens_per_pass):
            rows = [(rollouts[place].context, rollouts[place].tokens) for place in part]
            sums = torch.stack([q.sum() for q in self._log_ratios(rows)])
            outcomes = torch.tensor([rollouts[place].outcome for place in part]).to(sums)
            losses = outcome_losses(sums, outcomes, beta=self._config.beta)
            (losses.sum() / len(rollouts)).backward()
            loss += float(losses.detach().sum())
            num_right += float(((sums.detach() > 0) == (outcomes > 0.5)).sum())
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), self._config.max_grad_norm
        ).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ArithmeticError(f"loss {loss} and gradient norm {norm}; nothing was learned")
        self._optimizer.step()
        return _Update(loss=loss, num_right=num_right, grad_norm=norm)

    def _log_ratios(self, rows: Sequence[tuple[Int32, Int32]]) -> list[Tensor]:
        """q of each row. [T] each"""
        found: dict[int, Tensor] = {}
        lengths = [len(context) + len(tokens) for context, tokens in rows]
        for part in passes(lengths, at_most=self._config.max_tokens_per_pass):
            ids = [torch.from_numpy(_row(*rows[place])) for place in part]
            block, mask = padded(ids, self._device)
            firsts = [len(rows[place][0]) for place in part]
            ends = [lengths[place] for place in part]
            with torch.no_grad():
                frozen = self._token_log_probs(self._reference, block, mask, firsts, ends)
            learned = self._token_log_probs(self._model, block, mask, firsts, ends)
            for place, new, old in zip(part, learned, frozen, strict=True):
                found[place] = new - old
        return [found[place] for place in range(len(rows))]

    def _token_log_probs(
        self, model: Any, ids: Tensor, mask: Tensor, firsts: Sequence[int], ends: Sequence[int]
    ) -> list[Tensor]:
        """log p of the tokens [first, end) of each row, given those before them."""
        half = self._config.dtype == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            states = model.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            head = model.get_output_embeddings()
            return [
                _chosen_log_probs(head, states[row, first - 1 : end - 1], ids[row, first:end])
                for row, (first, end) in enumerate(zip(firsts, ends, strict=True))
            ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    loss: float  # sum over its answers
    num_right: float  # answers that the model had on the right side of 0 before the update
    grad_norm: float


def _parts(rollouts: Sequence[JudgedRollout], size: int) -> list[Sequence[JudgedRollout]]:
    return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]


def _row(context: Int32, tokens: Int32) -> Any:
    return np.concatenate([context, tokens]).astype(np.int64)


def _chosen_log_probs(head: Any, states: Tensor, chosen: Tensor) -> Tensor:
    """Slice by slice; a slice's logits are computed again for its gradient."""

    def log_probs(part: Tensor, tokens: Tensor) -> Tensor:
        logits = head(part).float()
        return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")

    slices = zip(
        states.split(_MAX_TOKENS_PER_LOGITS), chosen.split(_MAX_TOKENS_PER_LOGITS), strict=True
    )
    found = [
        checkpoint(log_probs, part, tokens, use_reentrant=False)
        if torch.is_grad_enabled()
        else log_probs(part, tokens)
        for part, tokens in slices
    ]
    return torch.cat(found)


def _running_sums(q: Tensor) -> list[float]:
    """[0, q_0, q_0 + q_1, ...]: the sum over any span is a difference of two."""
    sums = torch.cat([q.new_zeros(1), q.double().cumsum(0)])
    found: list[float] = sums.tolist()
    return found


def _verdict(sums: list[float] | None, problem: str | None, start: int, end: int) -> Verdict:
    if sums is None:
        return Verdict(value=None, failure=problem)
    value = sums[end] - sums[start]
    if not math.isfinite(value):
        return Verdict(value=None, failure=f"score {value}; expected a finite number")
    return Verdict(value=value)


def _loaded(name: str, device: torch.device) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"implicit_reward: {name} cannot be loaded by transformers: {error}; expected a "
            "causal language model with the policy's vocabulary"
        ) from error
    model.to(device).eval()
    _require_plain_head(name, model, device)
    return model


@torch.no_grad()
def _require_plain_head(name: str, model: Any, device: torch.device) -> None:
    """Some models scale their logits after the head, which reading slices would leave out."""
    ids = torch.tensor([[3, 2, 1]], device=device)
    states = model.base_model(input_ids=ids).last_hidden_state
    if not torch.allclose(model.get_output_embeddings()(states), model(ids).logits, atol=1e-3):
        raise UserError(
            f"implicit_reward: {name} changes its logits after the head, which is not supported; "
            "choose a model whose logits are the head's, such as Qwen or Llama"
        )
