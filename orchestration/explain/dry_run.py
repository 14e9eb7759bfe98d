"""A user's own algorithm tried on a small made-up step, gradient included, before anything starts.

Finds what reading the points cannot: wrong shapes, numbers that are none, states that no checkpoint
can hold. Refuses to judge whether the algorithm is any good.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from grpo.algorithms.user_file import errors_told
from grpo.errors import UserError
from grpo.objective import Objective
from grpo.pipeline import Pipeline
from grpo.types import Float64, Group, Prompt, Span
from orchestration.checkpoint import encoded_state
from orchestration.explain.explanation import Explanation, explained
from orchestration.group_file import groups_of
from orchestration.group_schema import (
    BatchInput,
    GroupInput,
    PromptInput,
    RolloutInput,
    ScoreInput,
)

MAX_SCORE_WAVES = 20
HIDDEN_SIZE, VOCABULARY = 4, 8
_HINT = (
    "\nit has two groups of short rollouts with mixed scores; `covey explain` shows any group of "
    "yours in the same way"
)


def require_dry_run(
    pipeline: Pipeline,
    objective: Objective,
    *,
    scorers: Mapping[str, float],
    num_generations: int,
    prompt: Prompt | None,  # a row of the data, whose columns the points may read
    file: Path,
) -> None:
    """UserError with the place in the user's file, if a step on made-up groups goes wrong."""
    batch = _batch(pipeline, scorers, num_generations, prompt)
    with errors_told(file, "a dry run of one step failed", _HINT):
        batch = _scored(pipeline, batch, tuple(scorers))
        found = explained(pipeline, objective, batch)
        encoded_state(found.state)
        encoded_state(found.next_state)
    if problem := number_problem(found):
        raise UserError(f"a dry run of one step on made-up groups: {problem}")


def number_problem(found: Explanation) -> str | None:
    """The first number or shape that is none."""
    if found.found is None:
        return None  # it selects; whether well or badly only real groups can tell
    streams: dict[str, list[list[Float64]]] = {
        "the advantage": found.found.advantages,
        "token_weight": found.found.policy_weights,
        "loss_weight": found.found.loss_weights,
        "aggregation": found.found.means,
        "the loss": [[row.loss for row in group] for group in found.rows],
        "the gradient of the loss": [[row.gradient for row in group] for group in found.rows],
    }
    for name, groups in streams.items():
        for place, group in enumerate(groups):
            sizes = [r.num_tokens for r in found.found.rewarded[place].group.rollouts]
            shapes = [np.shape(values) for values in group]
            if shapes != [(size,) for size in sizes]:
                return f"{name} has the shapes {shapes} for rollouts of {sizes} tokens"
            if not all(np.isfinite(values).all() for values in group):
                return f"{name} is not finite: {[np.asarray(v).tolist() for v in group]}"
    return None


def _batch(
    pipeline: Pipeline, scorers: Mapping[str, float], num_generations: int, prompt: Prompt | None
) -> BatchInput:
    rng = np.random.default_rng(0)
    shown = PromptInput() if prompt is None else _prompt(prompt)
    layer = rng.normal(size=(VOCABULARY, HIDDEN_SIZE))
    return BatchInput(
        groups=tuple(
            GroupInput(
                id=number,
                prompt=shown.model_copy(update={"id": f"{shown.id} ({number})"}),
                rollouts=tuple(_rollout(rng, i) for i in range(num_generations)),
                outcomes={
                    name: tuple(float((i + number) % 2) for i in range(num_generations))
                    for name in scorers
                },
            )
            for number in range(2)
        ),
        output_layer=tuple(map(tuple, layer.tolist())),
        weights=dict(scorers),
    )


def _prompt(prompt: Prompt) -> PromptInput:
    return PromptInput(
        id=prompt.id,
        text=prompt.text,
        tokens=tuple(prompt.tokens.tolist()),
        reference=prompt.reference,
        solution_tokens=tuple(prompt.solution_tokens.tolist()),
        domain=prompt.domain,
    ).model_copy(update={"columns": dict(prompt.columns)})


def _rollout(rng: np.random.Generator, index: int) -> RolloutInput:
    """A few tokens; the policy has moved a little since they were sampled."""
    size = 3 + index % 4
    log_probs = np.log(rng.uniform(0.2, 0.9, size))

    def moved() -> tuple[float, ...]:
        return tuple((log_probs + rng.normal(0, 0.05, size)).tolist())

    return RolloutInput(
        tokens=tuple(rng.integers(0, VOCABULARY, size).tolist()),
        token_texts=("1 + 1 = 2",) + ("\n3",) * (size - 1),
        log_probs=tuple(log_probs.tolist()),
        proximal_log_probs=moved(),
        current_log_probs=moved(),
        reference_log_probs=moved(),
        entropy=tuple(rng.uniform(0, 1, size).tolist()),
        hidden=tuple(map(tuple, rng.normal(size=(size, HIDDEN_SIZE)).tolist())),
    )


def _scored(pipeline: Pipeline, batch: BatchInput, scorers: tuple[str, ...]) -> BatchInput:
    """The batch with a score for every span that the algorithm asks for, wave by wave."""
    for _ in range(MAX_SCORE_WAVES):
        wanted = [_wanted(pipeline, group, scorers) for group in groups_of(batch)]
        if not any(wanted):
            return batch
        groups = [
            group.model_copy(update={"scores": (*group.scores, *map(_score, spans))})
            for group, spans in zip(batch.groups, wanted, strict=True)
        ]
        batch = batch.model_copy(update={"groups": tuple(groups)})
    raise ValueError(
        f"spans still asks for scores after {MAX_SCORE_WAVES} waves; it must leave out what is "
        "scored already, as grpo.spans.not_scored_yet does"
    )


def _wanted(pipeline: Pipeline, group: Group, scorers: tuple[str, ...]) -> list[tuple[str, Span]]:
    asked = pipeline.spans(group, scorers)
    return [(scorer, span) for scorer, spans in asked.items() for span in spans]


def _score(asked: tuple[str, Span]) -> ScoreInput:
    """Alternately good and bad, so that neither is all there is."""
    scorer, span = asked
    value = float((span.rollout + span.start + span.end) % 2)
    return ScoreInput(
        scorer=scorer, rollout=span.rollout, start=span.start, end=span.end, value=value
    )
