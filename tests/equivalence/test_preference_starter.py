"""A preference model of the starter world, from outcome labels alone, notices the first wrong step.

Its training answers are written in the manner of the starter model (`behaviours.py`), which costs
no sampling; `test_preference_run.py` samples them.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch

from orchestration.starter.behaviours import drawn_behaviour, written_trace
from orchestration.starter.data import distinct_problems
from orchestration.starter.world import (
    MAX_VALUE,
    Problem,
    answer_line,
    first_wrong_step,
    generated,
    is_solved,
)
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.encoder import Encoder
from reward_services.preference.head import UtilityHead
from reward_services.preference.model import PreferenceModel
from reward_services.preference.prefixes import PrefixRow
from reward_services.preference.questions import LabelledRollout, Question, split
from reward_services.preference.training import (
    PreferenceReport,
    encoded_pairs,
    measured,
    trained_head,
)
from rollout_workers.tokenization import Tokenization
from tests.unit.small_project import MODEL

NUM_QUESTIONS, ANSWERS, NUM_PLANTED = 400, 8, 60
MAX_TOKENS = 64


@cache
def tokenization() -> Tokenization:
    return Tokenization(str(MODEL))


def a_question(problem: Problem) -> Question:
    rng = random.Random(f"answers/{problem.prompt}")
    rollouts = []
    for _ in range(ANSWERS):
        trace = written_trace(problem, drawn_behaviour(problem.difficulty, rng), rng)
        tokens = [*tokenization().encode_text(trace).tolist(), tokenization().eos_id]
        rollouts.append(
            LabelledRollout(
                tokens=tuple(tokens[:MAX_TOKENS]),
                is_right=is_solved(problem, trace) and len(tokens) <= MAX_TOKENS,
            )
        )
    context = tokenization().encode_prompt(problem.prompt)
    return Question(id=problem.prompt, context=tuple(context.tolist()), rollouts=tuple(rollouts))


@cache
def trained() -> tuple[Encoder, UtilityHead, PreferenceReport]:
    config = PreferenceConfig(folder="unused", epochs=8)  # as many steps as more prompts would give
    problems = distinct_problems(NUM_QUESTIONS, seed=0, split="train")
    training, held_out = split(
        [a_question(problem) for problem in problems], share=config.validation_share, seed=0
    )
    encoder = Encoder(str(MODEL), dtype="float32", largest_surprise=True)
    head = trained_head(encoded_pairs(encoder, training, config, seed=0), config, seed=0)
    report = measured(head, encoded_pairs(encoder, held_out, config, seed=0))
    return encoder, head, report


def steps_with_a_slip(problem: Problem, slip: int | None) -> list[str]:
    """The right steps, but for the one whose result is wrong and carried on."""
    value, lines = problem.start, []
    for place, op in enumerate(problem.operations):
        result = op.applied(value)
        if place == slip:
            result += 1 if result < MAX_VALUE else -1
        lines.append(op.step(value, result))
        value = result
    return lines


def gains(problem: Problem, lines: list[str]) -> np.ndarray:
    """How much each step changes the utility of the answer so far."""
    encoder, head, _ = trained()
    text = "\n".join([*lines, answer_line(problem.answer)])
    tokens = tokenization().encode_text(text)
    _, token_ends = tokenization().decode(tokens)
    line_ends = np.cumsum([len(line) + 1 for line in lines])  # with the line break, as steps.py
    ends = [0, *(np.searchsorted(token_ends, line_ends) + 1).tolist()]
    row = PrefixRow(
        context=tokenization().encode_prompt(problem.prompt), tokens=tokens, ends=tuple(ends)
    )
    return np.diff(PreferenceModel(encoder, head).utilities([row])[0].numpy())


def test_held_out_pairs_are_told_apart_far_better_than_by_chance() -> None:
    report = trained()[2]
    assert report.num_pairs > 80
    assert report.pair_accuracy > 0.75  # 0.5 is chance; its deviation here is about 0.05
    assert report.log_loss < 0.6


def test_utilities_fall_after_a_first_wrong_step_and_not_after_the_right_one() -> None:
    wrong, right = [], []
    for index in range(NUM_PLANTED):
        problem = generated(7, index, 4, split="heldout")
        slip = 1 + index % 3
        slipped = steps_with_a_slip(problem, slip)
        assert first_wrong_step(problem, "\n".join(slipped)) == slip
        wrong.append(gains(problem, slipped)[slip])
        right.append(gains(problem, steps_with_a_slip(problem, None))[slip])
    falls = [float(np.mean(np.array(values) < 0)) for values in (wrong, right)]
    assert falls[0] > 0.7, f"utilities fell after {falls[0]:.0%} of the wrong steps"
    assert falls[1] < 0.3, f"utilities fell after {falls[1]:.0%} of the right steps"
    assert np.mean(np.array(wrong) < np.array(right)) > 0.9


def test_the_mean_state_alone_does_not_notice_it() -> None:
    """Why the largest surprise is on: else the test above could pass for another reason."""
    encoder, head, _ = trained()
    problem = generated(7, 0, 4, split="heldout")
    rows = []
    for slip in (None, 2):
        tokens = tokenization().encode_text("\n".join(steps_with_a_slip(problem, slip)))
        context = tokenization().encode_prompt(problem.prompt)
        rows.append(PrefixRow(context=context, tokens=tokens, ends=(len(tokens),)))
    clean, slipped = (features[0] for features in encoder.features(rows))
    calm = torch.cat([slipped[:-1], clean[-1:]])  # the slipped answer without its surprise
    with torch.no_grad():
        fall, calm_fall = (float(head(clean) - head(other)) for other in (slipped, calm))
    assert fall > 3 * abs(calm_fall)
