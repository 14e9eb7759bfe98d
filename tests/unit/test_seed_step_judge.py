"""The judge of the starter problems' steps, alone and behind its scorer."""

from __future__ import annotations

import asyncio
import random

import pytest
from pydantic import ValidationError

from grpo.steps import step_spans
from orchestration.starter.world import LineKind, generated, judged
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from reward_services.step_judge import starter_step
from tests.unit.grpo_groups import scored
from tests.unit.seed_groups import a_text_rollout, with_prompt

PROMPT = "7 +5 *3 -4"


def verdicts(trace, prompt=PROMPT):
    starts = [0, *(i + 1 for i, c in enumerate(trace) if c == "\n")]
    ends = [*starts[1:], len(trace)]
    return [starter_step(prompt, trace, a, b) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("7+5=12\n12*3=36\n36-4=32\nanswer: 32", [1, 1, 1, None]),
        ("7+5=13\n13*3=39", [0, 1]),  # one slip is one wrong step
        ("7+5=12\n13*3=39", [1, 0]),  # does not continue
        ("7*3=21\n21+5=26", [0, 0]),  # true, but not what is asked for next
        ("7+4=11", [0]),
        ("7+5=12\n12*3=36\n36-4=32\n32-4=28", [1, 1, 1, 0]),  # more than was asked for
        ("7+5=12\ncheck: 7+5=12\ncheck: 1+1=2\ncheck: 7+5=13\ncheck: oh", [1, 1, 1, 0, 0]),
        ("hello\n7+5=1", [None, 0]),
        ("7+5=\n7+5=12", [None, 1]),
        ("7-9=-2\n-2*3=-6", [0, 1]),
        ("", [None]),
    ],
)
def test_the_judge_recomputes_each_line_where_it_stands(trace, expected):
    assert verdicts(trace) == expected


def test_the_judge_takes_a_span_of_lines_as_one_step():
    trace = "7+5=12\n12*3=37\nanswer: 37"
    assert starter_step(PROMPT, trace, 0, len(trace)) == 0
    assert starter_step(PROMPT, trace, 0, 7) == 1
    assert starter_step(PROMPT, trace, 7, len(trace)) == 0
    assert starter_step(PROMPT, trace, 15, len(trace)) is None


def test_the_judge_agrees_with_the_world_that_made_the_problems():
    rng = random.Random(1)
    seen = {0.0: 0, 1.0: 0}
    for number in range(200):
        problem = generated(0, number, 2 + number % 5)
        trace = problem.solution
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(trace))
            # No "-": unlike the world, the judge reads negative values.
            trace = trace[:place] + rng.choice("0123456789+*=\n") + trace[place + 1 :]
        for line in judged(problem, trace):
            if line.kind is LineKind.STEP:
                found = starter_step(problem.prompt, trace, line.start, line.end)
                assert found == float(line.correct), (problem.prompt, trace, line)
                seen[found] += 1
    assert min(seen.values()) > 100


def scores(text, prompt=PROMPT):
    rollout = a_text_rollout(0, text)
    group = with_prompt(scored([rollout]), text=prompt)
    service = ScorerService(ScorerConfig(name="steps", rule="starter_steps"))
    spans = step_spans(rollout, 0, min_chars=1)
    return asyncio.run(service.score(group, spans)), spans


def test_the_service_scores_each_step_with_the_whole_trace_in_view():
    found, spans = scores("7+5=12\n13*3=39\n39-4=35\nanswer: 35")
    assert [score.value for score in found] == [1, 0, 1]
    assert [score.span for score in found] == list(spans)
    assert {score.failure for score in found} == {None}


def test_the_rule_needs_no_reference_and_refuses_other_prompts_and_answer_options():
    (score,), _ = scores("7+5=12", prompt="What is love?")
    assert score.value is None and "expects '7 +5 *3 -4'" in score.failure
    assert not ScorerConfig(name="steps", rule="starter_steps").needs_reference
    with pytest.raises(ValidationError, match="belongs to the rules exact and numeric"):
        ScorerConfig(name="steps", rule="starter_steps", require_marker=True)
