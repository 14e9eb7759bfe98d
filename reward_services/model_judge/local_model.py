"""Puts a judge's questions to a model of our own, in a process that a deadline can kill.

Knows nothing of the engines: each has a child module of its own, which holds the model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from grpo.errors import UserError
from reward_services.function_process import FunctionProcess
from reward_services.model_judge.config import (
    DEFAULT_PROMPT,
    DEFAULT_PROMPT_WITHHELD,
    LocalModelConfig,
    ModelJudgeConfig,
    Reference,
    Template,
    Turn,
    turns_of,
)
from reward_services.model_judge.questions import Question, Reply

JUDGE_FILE = "judge.json"  # beside the weights of a model that was trained as a judge
REPLIES = "replies"  # what a child can be asked
_CHILDREN = {
    "vllm": "reward_services.model_judge.vllm_child",
    "transformers": "reward_services.model_judge.transformers_child",
}


class LocalBackend:
    """Owns the process that holds the model; a killed one is replaced by the next question."""

    def __init__(self, config: ModelJudgeConfig) -> None:
        assert config.model is not None
        self._config = config
        self._model: LocalModelConfig = config.model
        options = {**config.model.model_dump(), "max_reply_tokens": config.max_reply_tokens}
        self._process = FunctionProcess(
            config.model.path,
            options,
            child=_CHILDREN[config.model.engine],
            environment=_environment(config.model),
            start_deadline_s=config.model.start_deadline_s,
        )

    async def start(self) -> Template:
        path = self._model.path
        if path.startswith((".", "/")) and not Path(path).is_dir():
            raise UserError(
                f"judge.model.path {path}: no such folder; name one with a model, or make a judge "
                f"of starter problems with covey judge train --out {path}"
            )
        prompt = trained_prompt(self._model.path, self._config.reference)
        await asyncio.to_thread(self._process.start)
        return prompt

    async def replies(
        self, questions: Sequence[Question], *, is_retry: bool, deadline_s: float
    ) -> list[Reply]:
        """A second try is drawn at random, as the likeliest reply would be the same again."""
        try:
            found = await asyncio.to_thread(
                self._process.asked, REPLIES, (list(questions), is_retry), deadline_s=deadline_s
            )
            return cast(list[Reply], found)
        except asyncio.CancelledError:
            self._process.kill()  # its late answer would be taken for the next question's
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._process.kill)


def trained_prompt(path: str, reference: Reference) -> Template:
    """The prompt that a model was trained with, else a general one.

    UserError if it was trained with another reference than the recipe gives it.
    """
    withheld = reference == "withheld"
    file = Path(path) / JUDGE_FILE
    if not file.is_file():
        return DEFAULT_PROMPT_WITHHELD if withheld else DEFAULT_PROMPT
    facts = json.loads(file.read_text())
    if facts["reference"] != reference:
        raise UserError(
            f"judge.reference is {reference}, but the judge in {path} was trained with "
            f"{facts['reference']}: set judge.reference: {facts['reference']}, or train another"
        )
    return tuple(Turn.model_validate(turn) for turn in facts["prompt"])


def write_trained_prompt(folder: Path, *, prompt: Template, reference: Reference) -> None:
    """What `trained_prompt` reads."""
    turns = [turn.model_dump() for turn in turns_of(prompt)]
    facts = {"prompt": turns, "reference": reference}
    (folder / JUDGE_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def _environment(model: LocalModelConfig) -> dict[str, str]:
    """What has to be set before the child imports torch."""
    variables = {
        "OMP_NUM_THREADS": str(model.threads),
        # Threads that spin while they wait starve the other processes of the machine.
        "KMP_BLOCKTIME": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(model.path).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if model.engine == "vllm":
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is the engine's process
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins itself to all cores
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
    return variables
