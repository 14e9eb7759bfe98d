"""A preference model that goes on learning during a run, from the groups that the run trains on.

Its encoder stays frozen; its head is trained further, on the pairs of some steps at a time. Knows
nothing of who calls it when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch

from reward_services.asked_rollouts import AskedRollouts
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.encoder import Encoder
from reward_services.preference.head import WEIGHTS_FILE, UtilityHead
from reward_services.preference.model import PreferenceModel, loaded_parts
from reward_services.preference.questions import (
    Question,
    question_pairs,
    read_questions,
    write_questions,
)
from reward_services.preference.training import encoded_pairs, measured, trained_head
from reward_services.user_functions import Verdict

_STATE_FILE, _SEED = "refresh.json", 0


class RefreshedModel:
    """Owns the encoder, the present head and the answers that it has not learned from yet."""

    def __init__(self, encoder: Encoder, head: UtilityHead, config: PreferenceConfig) -> None:
        assert config.refresh is not None
        self._encoder = encoder
        self._head = head
        self._config = config
        self._every_steps = config.refresh.every_steps
        self._waiting: list[Question] = []
        self._num_steps = 0  # since the last refresh

    def verdicts(self, asked: AskedRollouts) -> list[Verdict]:
        """As PreferenceModel, with the present head."""
        return PreferenceModel(self._encoder, self._head).verdicts(asked)

    def learn(self, questions: Sequence[Question]) -> Mapping[str, float]:
        """Remember the answers of a step; every so many steps train on what is remembered.

        The accuracy is that of the old head on the new pairs, which it has never seen.
        """
        self._waiting += questions
        self._num_steps += 1
        if self._num_steps < self._every_steps:
            return {"refreshed": 0.0}
        asked, self._waiting, self._num_steps = self._waiting, [], 0
        at_most = self._config.max_pairs_per_question
        if not any(question_pairs(q, at_most=at_most, seed=_SEED) for q in asked):
            return {"refreshed": 0.0, "num_pairs": 0.0}
        pairs = encoded_pairs(self._encoder, asked, self._config, seed=_SEED)
        before = measured(self._head, pairs)
        self._head = trained_head(pairs, self._config, seed=_SEED, start=self._head)
        return {
            "refreshed": 1.0,
            "num_pairs": float(before.num_pairs),
            "pair_accuracy": before.pair_accuracy,
            "log_loss": before.log_loss,
        }

    def save(self, folder: str) -> None:
        """The head, and what it has still to learn from."""
        safetensors.torch.save_file(self._head.state_dict(), Path(folder, WEIGHTS_FILE))
        write_questions(Path(folder), self._waiting)
        Path(folder, _STATE_FILE).write_text(json.dumps({"num_steps": self._num_steps}))

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote."""
        self._head.load_state_dict(safetensors.torch.load_file(Path(folder, WEIGHTS_FILE)))
        self._waiting = read_questions(Path(folder))
        self._num_steps = json.loads(Path(folder, _STATE_FILE).read_text())["num_steps"]


def loaded_refreshed(folder: Path, config: PreferenceConfig) -> RefreshedModel:
    """The model of a folder, ready to learn further."""
    return RefreshedModel(*loaded_parts(folder, encoder=config.encoder), config)
