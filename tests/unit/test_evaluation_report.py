"""Evaluation: unbiased pass@k, failures that are never zeros, and what depends on what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from grpo.errors import Fatal, PromptTooLong, Unscorable, UserError
from grpo.types import (
    FinishReason,
    Group,
    LoadReport,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    Score,
    Span,
    WeightRef,
)
from orchestration.evaluation import EvalReport, evaluate, pass_at_k

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4)


def prompt(number: int, **columns: object) -> Prompt:
    return Prompt(
        id=f"row-{number}", text="?", tokens=np.array([number], np.int32), columns=columns
    )


class DiceEngine:
    """Answers with a number drawn from the request's seed; counts who is served at once."""

    def __init__(self) -> None:
        self.inside = self.most_inside = 0
        self.requests: list[SampleRequest] = []

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        for _ in range(3):
            await asyncio.sleep(0)  # lets the others in
        self.inside -= 1
        self.requests += requests
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: SampleRequest) -> Rollout:
        number = int(np.random.default_rng(request.seed).integers(100))
        size = 1 + number % 4
        return Rollout(
            index=request.index,
            context=request.context,
            tokens=np.full(size, number, np.int32),
            log_probs=np.zeros(size, np.float32),
            origins=np.zeros(size, np.uint8),
            versions=np.zeros(size, np.int32),
            text=str(number),
            token_ends=np.ones(size, np.int32),
            finish_reason=FinishReason.LENGTH if size == 4 else FinishReason.STOP,
        )

    async def load_weights(self, ref: WeightRef) -> LoadReport:
        raise AssertionError("an evaluation does not touch the weights")


class RefusingEngine(DiceEngine):
    """Does not take prompt 0."""

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        if requests[0].context[0] == 0:
            raise PromptTooLong("600 tokens, at most 512")
        return await super().sample(requests)


class ThresholdScorer:
    """1 below 30, else 0; cannot judge, or has no opinion on, numbers of its choice."""

    def __init__(self, fails_from: int = 100, silent_from: int = 100) -> None:
        self.fails_from = fails_from
        self.silent_from = silent_from

    async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
        return [self._score(group, span) for span in spans]

    def _score(self, group: Group, span: Span) -> Score:
        rollout = group.rollouts[span.rollout]
        assert (span.start, span.end) == (0, rollout.num_tokens)
        number = int(rollout.text)
        if number >= self.fails_from:
            return Score(scorer="t", span=span, value=None, failure="it raised")
        value = None if number >= self.silent_from else float(number < 30)
        return Score(scorer="t", span=span, value=value)


def run(
    prompts: Sequence[Prompt],
    engine: DiceEngine | None = None,
    scorer: ThresholdScorer | None = None,
    *,
    samples: int = 4,
    seed: int = 0,
    concurrency: int = 8,
) -> EvalReport:
    return asyncio.run(
        evaluate(
            engine or DiceEngine(),
            scorer or ThresholdScorer(),
            prompts,
            samples=samples,
            sampling=SAMPLING,
            seed=seed,
            first_group=1000,
            concurrency=concurrency,
        )
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_passing_completion(n: int) -> None:
    for c in range(n + 1):
        passes = [place < c for place in range(n)]
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(passes, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_figures_are_those_of_the_completions_counted_by_hand() -> None:
    engine = DiceEngine()
    report = run([prompt(0), prompt(1), prompt(2)], engine)
    numbers = np.array(
        [np.random.default_rng(request.seed).integers(100) for request in engine.requests]
    ).reshape(3, 4)
    assert sorted({request.group for request in engine.requests}) == [1000, 1001, 1002]
    assert report.overall.pass_at[1] == pytest.approx((numbers < 30).mean())
    assert report.overall.pass_at[4] == pytest.approx((numbers < 30).any(axis=1).mean())
    assert list(report.overall.pass_at) == [1, 2, 4]
    assert report.overall.mean_length == pytest.approx((1 + numbers % 4).mean())
    assert report.overall.clipped_ratio == pytest.approx((numbers % 4 == 3).mean())
    rates = (numbers < 30).mean(axis=1)
    assert report.overall.standard_error == pytest.approx(rates.std(ddof=1) / 3**0.5)


def test_the_result_does_not_depend_on_how_many_prompts_run_at_once() -> None:
    prompts = [prompt(number, difficulty=number % 3) for number in range(20)]
    engine = DiceEngine()
    assert run(prompts, concurrency=1) == run(prompts, engine, concurrency=7)
    assert engine.most_inside == 7


def test_another_seed_asks_for_other_completions() -> None:
    prompts = [prompt(number) for number in range(20)]
    assert run(prompts, seed=0) != run(prompts, seed=1)


def test_a_failed_score_is_counted_and_is_not_a_zero() -> None:
    prompts = [prompt(number) for number in range(50)]
    clean, failing = run(prompts), run(prompts, scorer=ThresholdScorer(fails_from=95))
    failed = failing.failures["it raised"]
    assert 0 < failed == 200 - failing.overall.num_scored
    # All that failed would have scored 0: leaving them out raises the mean by exactly this.
    assert failing.overall.mean_score == pytest.approx(
        clean.overall.mean_score * 200 / (200 - failed)
    )


def test_too_many_failed_scores_end_the_evaluation_with_their_cause() -> None:
    with pytest.raises(Fatal, match="it raised"):
        run([prompt(number) for number in range(20)], scorer=ThresholdScorer(fails_from=50))


def test_a_scorer_without_opinion_leaves_no_score_and_no_failure() -> None:
    prompts = [prompt(number) for number in range(20)]
    report = run(prompts, scorer=ThresholdScorer(silent_from=30))
    assert report.failures == {}
    assert report.overall.pass_at[1] == 1.0
    assert report.overall.num_scored < 80


def test_a_scorer_that_judges_nothing_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="answer_column"):
        run([prompt(0)], scorer=ThresholdScorer(silent_from=0))


def test_a_prompt_that_the_engine_refuses_is_reported_and_the_others_go_on() -> None:
    report = run([prompt(number) for number in range(20)], RefusingEngine())
    assert report.failures == {"PromptTooLong: 600 tokens, at most 512": 4}
    assert report.overall.num_scored == 76


def test_a_lost_engine_is_raised_as_itself_and_not_as_a_group_of_errors() -> None:
    class LostEngine(DiceEngine):
        async def sample(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
            raise Fatal("the engine is gone")

    with pytest.raises(Fatal, match="the engine is gone"):
        run([prompt(number) for number in range(3)], LostEngine())


def test_a_scorer_that_raises_unscorable_fails_the_group_only() -> None:
    class PickyScorer(ThresholdScorer):
        async def score(self, group: Group, spans: Sequence[Span]) -> list[Score]:
            if group.prompt.id == "row-0":
                raise Unscorable("no number in the answer")
            return await super().score(group, spans)

    report = run([prompt(number) for number in range(20)], scorer=PickyScorer())
    assert report.failures == {"Unscorable: no number in the answer": 4}


def test_figures_are_split_by_difficulty_in_its_own_order() -> None:
    prompts = [prompt(number, difficulty=(2, 10, 1)[number % 3]) for number in range(9)]
    report = run(prompts)
    assert list(report.by["difficulty"]) == ["1", "2", "10"]
    assert [part.num_prompts for part in report.by["difficulty"].values()] == [3, 3, 3]
    parts = [part.pass_at[1] for part in report.by["difficulty"].values()]
    assert report.overall.pass_at[1] == pytest.approx(sum(parts) / 3)
    assert "domain" not in report.by  # there is but one


def test_no_prompts_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="no prompt"):
        run([])


def test_a_report_is_json() -> None:
    report = run([prompt(0, difficulty="a"), prompt(1, difficulty="b")])
    data = report.as_json()
    assert data["overall"]["pass_at"]["4"] == report.overall.pass_at[4]
    assert report.metrics()["eval/pass@4"] == report.overall.pass_at[4]
