"""How good a model is on a set of prompts: pass@1, unbiased pass@k, length, by difficulty, domain.

A rollout passes if its score is above one half, which suits scores of 0 and 1 as well as -1 and 1.
A score that failed is counted apart and is never a zero. Refuses to know where the engine runs.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from grpo.engines import RolloutEngine, Scorer
from grpo.errors import BadInput, Fatal, UserError
from grpo.types import Group, Prompt, SampleRequest, Sampling, Span
from orchestration.group_task import rollout_seed

PASS_ABOVE = 0.5
# Above this share of failed scores the rest would not be a fair picture of the model.
MAX_FAILED_SHARE = 0.1
DIFFICULTY_COLUMN = "difficulty"
MAX_DOMAINS = 20  # that metrics name, the largest; more would bury the other metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of some prompts."""

    num_prompts: int
    num_scored: int  # completions with a score
    pass_at: Mapping[int, float]  # by k; unbiased, over the prompts with k scores or more
    standard_error: float  # of pass@1, over prompts
    mean_score: float
    mean_length: float  # tokens of a completion
    clipped_ratio: float  # share of completions that the token budget ended


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """What an evaluation found."""

    num_samples: int  # completions asked for per prompt
    overall: Measured
    by: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)  # difficulty, domain
    failures: Mapping[str, int] = field(default_factory=dict)  # completions without score, by cause

    def as_json(self) -> dict[str, object]:
        """For summary.json and `--json`."""
        return {name: _as_json(value) for name, value in asdict(self).items()}

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl and the trackers."""
        found = self.overall
        return {
            **{f"eval/pass@{k}": value for k, value in found.pass_at.items()},
            "eval/mean_score": found.mean_score,
            "eval/mean_length": found.mean_length,
            "eval/clipped_ratio": found.clipped_ratio,
            "eval/failed_scores": float(sum(self.failures.values())),
            **{f"eval/{name}/pass@1": value for name, value in self._largest_domains()},
        }

    def _largest_domains(self) -> Iterator[tuple[str, float]]:
        """pass@1 of those with the most prompts."""
        domains = self.by["domain"] if "domain" in self.by else {}
        sizes = {name: found.num_prompts for name, found in domains.items()}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name))[:MAX_DOMAINS]:
            if 1 in domains[name].pass_at:  # else none of its completions has a score
                yield name, domains[name].pass_at[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """One prompt with what became of its completions."""

    prompt: Prompt
    scores: tuple[float, ...]
    failures: tuple[str, ...]
    lengths: tuple[int, ...]
    num_clipped: int

    @property
    def num_passed(self) -> int:
        return sum(score > PASS_ABOVE for score in self.scores)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that k of n completions, c of which pass, hold a passing one: 1 - C(n-c,k) / C(n,k).

    The unbiased estimator of arXiv:2107.03374. n = 4, c = 1, k = 2: 1 - 3/6 = 0.5.
    """
    assert 0 <= num_passed <= num_samples
    assert 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


async def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    first_group: int,
    concurrency: int,
) -> EvalReport:
    """Complete every prompt `samples` times and score it; `concurrency` prompts at a time.

    Prompt number i is group `first_group + i`, which with the seed decides what is sampled.
    """
    if not prompts:
        raise UserError("nothing to evaluate: the evaluation data holds no prompt")
    outcomes: dict[int, _Outcome] = {}
    queue = iter(list(enumerate(prompts)))

    async def complete() -> None:
        """Consumes the queue; waits for engine and scorer; ends with the queue."""
        for place, prompt in queue:
            requests = _requests(prompt, first_group + place, samples, sampling, seed)
            outcomes[place] = await _outcome(engine, scorer, prompt, requests)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(prompts))):
                tasks.create_task(complete())
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    return _report([outcomes[place] for place in range(len(prompts))], samples)


def _requests(
    prompt: Prompt, group: int, samples: int, sampling: Sampling, seed: int
) -> list[SampleRequest]:
    return [
        SampleRequest(
            group=group,
            index=index,
            context=prompt.tokens,
            guidance=np.zeros(0, np.int32),
            sampling=sampling,
            seed=rollout_seed(seed, group, 0, index),
        )
        for index in range(samples)
    ]


async def _outcome(
    engine: RolloutEngine, scorer: Scorer, prompt: Prompt, requests: Sequence[SampleRequest]
) -> _Outcome:
    empty = _Outcome(prompt=prompt, scores=(), failures=(), lengths=(), num_clipped=0)
    try:
        rollouts = await engine.sample(requests)
    except BadInput as error:
        return replace(empty, failures=(_cause(error),) * len(requests))
    sampled = replace(
        empty,
        lengths=tuple(rollout.num_tokens for rollout in rollouts),
        num_clipped=sum(rollout.is_truncated for rollout in rollouts),
    )
    group = Group(id=requests[0].group, prompt=prompt, rollouts=tuple(rollouts))
    spans = [
        Span(rollout=place, start=0, end=rollout.num_tokens)
        for place, rollout in enumerate(rollouts)
    ]
    try:
        scores = await scorer.score(group, spans)
    except BadInput as error:
        return replace(sampled, failures=(_cause(error),) * len(spans))
    return replace(
        sampled,
        scores=tuple(score.value for score in scores if score.value is not None),
        failures=tuple(score.failure for score in scores if score.failure is not None),
    )


def _report(outcomes: Sequence[_Outcome], samples: int) -> EvalReport:
    failures = Counter(failure for outcome in outcomes for failure in outcome.failures)
    num_asked = samples * len(outcomes)
    if failures.total() > MAX_FAILED_SHARE * num_asked:
        cause, count = failures.most_common(1)[0]
        raise Fatal(
            f"{failures.total()} of {num_asked} completions could not be scored, which is more "
            f"than {MAX_FAILED_SHARE:.0%}; the commonest cause ({count} times): {cause}"
        )
    if not any(outcome.scores for outcome in outcomes):
        raise UserError(
            f"the scorer had nothing to say about any of {len(outcomes)} prompts; give it what "
            "it needs, for example the right answers (`data.answer_column`)"
        )
    by = {name: _slices(name, outcomes, samples) for name in ("difficulty", "domain")}
    return EvalReport(
        num_samples=samples,
        overall=_measured(outcomes, samples),
        by={name: slices for name, slices in by.items() if len(slices) > 1},
        failures=dict(failures),
    )


def _slices(name: str, outcomes: Sequence[_Outcome], samples: int) -> dict[str, Measured]:
    """The same figures for every value of the property; prompts that lack it are in none."""
    members: dict[str, list[_Outcome]] = defaultdict(list)
    for outcome in outcomes:
        columns = outcome.prompt.columns
        if name == "domain":
            members[outcome.prompt.domain].append(outcome)
        elif DIFFICULTY_COLUMN in columns:
            members[str(columns[DIFFICULTY_COLUMN])].append(outcome)
    return {value: _measured(members[value], samples) for value in sorted(members, key=_natural)}


def _measured(outcomes: Sequence[_Outcome], samples: int) -> Measured:
    rates = [o.num_passed / len(o.scores) for o in outcomes if o.scores]
    scores = [score for outcome in outcomes for score in outcome.scores]
    lengths = [length for outcome in outcomes for length in outcome.lengths]
    return Measured(
        num_prompts=len(outcomes),
        num_scored=len(scores),
        pass_at={k: value for k in _ks(samples) for value in _pass_at(outcomes, k)},
        standard_error=float(np.std(rates, ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0.0,
        mean_score=float(np.mean(scores)) if scores else math.nan,
        mean_length=float(np.mean(lengths)) if lengths else math.nan,
        clipped_ratio=sum(o.num_clipped for o in outcomes) / max(len(lengths), 1),
    )


def _pass_at(outcomes: Sequence[_Outcome], k: int) -> Iterator[float]:
    """Mean over the prompts with at least k scores; nothing where there is no such prompt."""
    values = [pass_at_k(len(o.scores), o.num_passed, k) for o in outcomes if len(o.scores) >= k]
    if values:
        yield sum(values) / len(values)


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of completions itself."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*powers, samples]


def _natural(value: str) -> tuple[float, str]:
    """Numbers in their order, before words in theirs."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _cause(error: BadInput) -> str:
    return f"{type(error).__name__}: {error}"


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first root cause; the others failed because of it or at the same time."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _as_json(value: object) -> object:
    """Keys as text, and rates to six digits: 0.75 and not 0.7500000000000001."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value
