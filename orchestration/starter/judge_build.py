"""Makes a judge of steps from the starter's base model and measures it on held-out problems.

Seeded: the same seed, steps and thread count on the same machine give the same weights.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from orchestration.starter.build import shipped_model_dir
from orchestration.starter.judge_data import (
    PROMPT,
    PROMPT_WITHHELD,
    LabelledTrace,
    drawn_trace,
    question_and_reply,
)
from orchestration.starter.judge_training import (
    cut_off,
    judge_tokenizer,
    train_judge,
    widened,
)
from orchestration.starter.tokenizer import MAX_TOKENS
from orchestration.starter.training import TrainingProgress
from reward_services.model_judge.config import LocalModelConfig, Reference
from reward_services.model_judge.local_model import write_trained_prompt
from reward_services.model_judge.questions import Question, first_wrong_step
from reward_services.model_judge.transformers_child import TransformersJudge

DEFAULT_STEPS = 1000
NUM_MEASURED_TRACES = 500
MAX_REPLY_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReport:
    """What was built and how well it does on held-out problems, traces drawn as in training."""

    model_dir: Path
    num_parameters: int
    training_s: float
    agreement: Agreement

    def as_json(self) -> dict[str, object]:
        """For --json."""
        return {**asdict(self), "model_dir": str(self.model_dir)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A judge beside the rule, answer by answer, on the first wrong step."""

    num_answers: int
    num_wrong_steps: int  # answers in which the rule finds one
    exact: float  # share of all answers; "no step is wrong" counts as an answer of its own
    exact_wrong: float  # share of those in which the rule finds a wrong step
    off_by_one: float  # share of those: the judge names a neighbour of the step
    always_none: float  # what a judge would reach that never finds anything


def agreement(judge: Sequence[int | None], rule: Sequence[int | None]) -> Agreement:
    """Judge 1, none, 3, 2 and rule 1, none, 2, none: exact 1/2, exact_wrong 1/2, off_by_one 1/2."""
    pairs = list(zip(judge, rule, strict=True))
    wrong = [(found, said) for found, said in pairs if said is not None]
    near = [found is not None and abs(found - said) == 1 for found, said in wrong]
    return Agreement(
        num_answers=len(pairs),
        num_wrong_steps=len(wrong),
        exact=_share([found == said for found, said in pairs]),
        exact_wrong=_share([found == said for found, said in wrong]),
        off_by_one=_share(near),
        always_none=_share([said is None for _, said in pairs]),
    )


def build_judge(
    out_dir: Path,
    *,
    seed: int = 0,
    num_steps: int = DEFAULT_STEPS,
    with_reference: bool = True,
    base: Path | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> JudgeReport:
    """Train a judge, write it to `out_dir` as a Hugging Face folder, and measure it."""
    if num_steps < 1:
        raise ValueError(f"found num_steps={num_steps}; expected at least 1")
    tokenizer = judge_tokenizer()
    model = widened(shipped_model_dir() if base is None else base, seed=seed)
    started = time.perf_counter()
    train_judge(
        model,
        tokenizer,
        seed=seed,
        num_steps=num_steps,
        with_reference=with_reference,
        on_progress=on_progress,
    )
    training_s = time.perf_counter() - started
    _write(out_dir, model, tokenizer, with_reference=with_reference)
    rng = random.Random(f"judge measurement/{seed}")
    traces = [
        drawn_trace(rng, number, seed=seed, split="heldout", cut_off=partial(cut_off, tokenizer))
        for number in range(NUM_MEASURED_TRACES)
    ]
    judged = _judged(out_dir, traces, with_reference=with_reference)
    return JudgeReport(
        model_dir=out_dir,
        num_parameters=model.num_parameters(),
        training_s=training_s,
        agreement=agreement(judged, [trace.first_wrong for trace in traces]),
    )


def judge_model(path: Path, *, engine: str = "vllm") -> LocalModelConfig:
    """How a scorer holds such a judge."""
    return LocalModelConfig.model_validate(
        {"path": str(path), "engine": engine, "max_model_len": MAX_TOKENS}
    )


def _judged(
    folder: Path, traces: Sequence[LabelledTrace], *, with_reference: bool
) -> list[int | None]:
    """What the written model says, with the same choice among replies as a scorer's."""
    options = judge_model(folder, engine="transformers").model_dump()
    judge = TransformersJudge(str(folder), {**options, "max_reply_tokens": MAX_REPLY_TOKENS})
    questions = []
    for trace in traces:
        content, _ = question_and_reply(trace, with_reference=with_reference)
        message = {"role": "user", "content": content}
        questions.append(Question(messages=(message,), num_steps=len(trace.ends)))
    replies = judge.replies((questions, False))
    return [
        first_wrong_step(str(reply.text), question.num_steps)
        for reply, question in zip(replies, questions, strict=True)
    ]


def _write(
    out_dir: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    with_reference: bool,
) -> None:
    """Write to a neighbouring folder first, so that `out_dir` is never half a model."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = out_dir.with_name(f".{out_dir.name}.partial")
    model.save_pretrained(partial_dir)
    tokenizer.save_pretrained(partial_dir)
    reference: Reference = "solution" if with_reference else "withheld"
    prompt = PROMPT if with_reference else PROMPT_WITHHELD
    write_trained_prompt(partial_dir, prompt=prompt, reference=reference)
    if out_dir.exists():
        shutil.rmtree(out_dir)
    partial_dir.rename(out_dir)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")
