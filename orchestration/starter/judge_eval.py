"""A trained judge beside the rule, on wrong answers that the starter's base model really gave.

Both are scorers as a run has them, asked about the steps as SGPO cuts them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, Qwen2ForCausalLM

from grpo.errors import UserError
from grpo.steps import step_spans
from grpo.types import Group, Prompt, Score, Span
from orchestration.check import written
from orchestration.starter.build import shipped_model_dir
from orchestration.starter.data import distinct_problems
from orchestration.starter.judge_build import Agreement, agreement, judge_model
from orchestration.starter.measurement import Completion, rolled_out
from orchestration.starter.world import Problem, is_solved
from reward_services.config import ScorerConfig
from reward_services.model_judge.config import ModelJudgeConfig
from reward_services.model_judge.local_model import JUDGE_FILE
from reward_services.service import ScorerService

MAX_ROLLOUTS = 5000  # of the base model, which is wrong in four of five
DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeEvaluation:
    """How often judge and rule name the same first wrong step, and how fast the judge is."""

    agreement: Agreement
    num_unreadable_replies: int
    num_unscored: int  # answers of which the judge said nothing that could be read
    answers_per_s: float  # once the model is loaded

    def as_json(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


def evaluate_judge(
    folder: Path, *, engine: str = "vllm", num_answers: int = 200, seed: int = 0
) -> JudgeEvaluation:
    """Score the same wrong answers with the model and with the rule."""
    if not (folder / JUDGE_FILE).is_file():
        raise UserError(
            f"{folder} holds no judge ({JUDGE_FILE}): train one with covey judge train "
            f"--out {folder}"
        )
    groups = wrong_answers(num_answers, seed=seed)
    config = judge_scorer(folder, engine=engine)
    return asyncio.run(_evaluated(config, groups))


def judge_scorer(folder: Path, *, engine: str = "vllm") -> ScorerConfig:
    """The scorer of a judge that `covey judge train` wrote."""
    reference = json.loads((folder / JUDGE_FILE).read_text())["reference"]
    return ScorerConfig(
        name="steps",
        judge=ModelJudgeConfig(model=judge_model(folder, engine=engine), reference=reference),
        batch_size=256,
        deadline_s=DEADLINE_S,
    )


def wrong_answers(num_answers: int, *, seed: int) -> list[Group]:
    """Different wrong answers of the base model to held-out problems, a group for each prompt."""
    model = Qwen2ForCausalLM.from_pretrained(shipped_model_dir()).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_dir())
    problems = distinct_problems(num_answers, seed=seed, split="heldout")
    found: dict[str, dict[str, Completion]] = {}
    num_found = 0
    for _ in range(MAX_ROLLOUTS // num_answers + 1):
        seed += 1
        for answer in rolled_out(model, tokenizer, problems, num_completions=1, seed=seed):
            texts = found.setdefault(answer.problem.prompt, {})
            if is_wrong(answer) and answer.text not in texts and num_found < num_answers:
                texts[answer.text] = answer
                num_found += 1
        if num_found == num_answers:
            break
    prompts = {problem.prompt: problem for problem in problems}
    return [_group(prompts[prompt], list(texts)) for prompt, texts in found.items() if texts]


def is_wrong(answer: Completion) -> bool:
    """A cut-off answer is wrong, too; one without any text has no step to judge."""
    return bool(answer.text.strip()) and (
        answer.is_truncated or not is_solved(answer.problem, answer.text)
    )


async def _evaluated(config: ScorerConfig, groups: Sequence[Group]) -> JudgeEvaluation:
    rule = ScorerService(ScorerConfig(name="rule", rule="starter_steps"))
    judge = ScorerService(config)
    try:
        await judge.start()
        await _scored(judge, groups[:1])  # vLLM warms up at its first question
        started = time.perf_counter()
        judged = await _scored(judge, groups)
        seconds = time.perf_counter() - started
        counters = judge.statistics_so_far()
    finally:
        await judge.close()
    ruled = await _scored(rule, groups)
    known = [
        (_first_wrong(found), _first_wrong(said))
        for found, said in zip(judged, ruled, strict=True)
        if any(score.value is not None for score in found)
    ]
    return JudgeEvaluation(
        agreement=agreement([found for found, _ in known], [said for _, said in known]),
        num_unreadable_replies=int(counters["num_unreadable_replies"]),
        num_unscored=len(judged) - len(known),
        answers_per_s=len(judged) / seconds,
    )


async def _scored(service: ScorerService, groups: Sequence[Group]) -> list[list[Score]]:
    """The scores of each answer's steps."""
    scores = await asyncio.gather(*[service.score(group, step_spans_of(group)) for group in groups])
    return [
        [score for score in part if score.span.rollout == rollout.index]
        for group, part in zip(groups, scores, strict=True)
        for rollout in group.rollouts
    ]


def _first_wrong(scores: Sequence[Score]) -> int | None:
    """From 1; None: no step is wrong, or none can be judged."""
    return next((number for number, score in enumerate(scores, 1) if score.value == 0), None)


def step_spans_of(group: Group) -> list[Span]:
    """As SGPO cuts the answers of the starter."""
    return [
        span
        for place, rollout in enumerate(group.rollouts)
        for span in step_spans(rollout, place, min_chars=1)
    ]


def _group(problem: Problem, texts: Sequence[str]) -> Group:
    prompt = Prompt(
        id=problem.prompt,
        text=problem.prompt,
        tokens=np.zeros(1, np.int32),
        reference=str(problem.answer),
        columns={"solution": problem.solution},
    )
    group = written(prompt, texts)
    # Scorers tell answers of the same length apart by their tokens.
    rollouts = [
        replace(rollout, tokens=np.array([ord(character) for character in text], np.int32))
        for rollout, text in zip(group.rollouts, texts, strict=True)
    ]
    return replace(group, rollouts=tuple(rollouts))
