"""Whether a run still learns, from the metrics of its steps: each sign of trouble with its remedy.

Pure functions over the lines of metrics.jsonl; refuses to know whether the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from orchestration.config import Recipe

Metrics = Mapping[str, float | None]  # None: was not finite

RECENT_STEPS = 10  # a sign must hold for so long: single steps are noise
LONG_ENOUGH = 3 * RECENT_STEPS  # before a step can be slow for this run
COLLAPSED = 0.33  # of the run's own median throughput
GAP_SHARE = 0.5  # of what alarms.log_prob_gap allows
DROPPED_SHARE = 0.8  # of all groups
FAILED_SHARE = 0.1  # of all groups, for want of a score


def steps_of(lines: Iterable[Metrics]) -> list[Metrics]:
    """Those of training steps; those of evaluations and checkpoints have no step time."""
    return [line for line in lines if "timing_s/step" in line]


def missing_steps(steps: Sequence[Metrics]) -> Iterator[str]:
    """Every step up to the last one has a line."""
    found = {int(line["step"] or 0) for line in steps}
    missing = sorted(set(range(1, max(found, default=0))) - found)
    if missing:
        yield (
            f"metrics.jsonl was changed or damaged: it has no line of {len(missing)} steps, the "
            f"first of them step {missing[0]}"
        )


def signs_of_trouble(steps: Sequence[Metrics], recipe: Recipe) -> Iterator[str]:
    """One sentence each, with what to do; nothing: the run looks healthy."""
    recent = steps[-RECENT_STEPS:]
    if not recent:
        return
    yield from _not_finite(recent[-1])
    if len(recent) == RECENT_STEPS:
        yield from _no_signal(recent)
        yield from _cut_off(recent)
        yield from _dropping(recent, recipe)
    yield from _drifting(recent, recipe)
    yield from _slow(steps)


def _not_finite(last: Metrics) -> Iterator[str]:
    broken = [name for name in ("loss", "grad_norm", "reward") if last.get(name, 0.0) is None]
    if broken:
        yield (
            f"{', '.join(broken)} of the last step is no finite number: `covey replay RUN STEP` "
            "shows the token"
        )


def _no_signal(recent: Sequence[Metrics]) -> Iterator[str]:
    if _always(recent, "frac_reward_zero_std", 1.0):
        yield (
            f"learning has stopped: in the last {len(recent)} steps all rewards of every group "
            "were equal. Take easier prompts (all wrong) or harder ones (all right), raise "
            "sampling.temperature or the rollouts of a group, or look whether the scorer gives "
            "the same score to everything"
        )


def _cut_off(recent: Sequence[Metrics]) -> Iterator[str]:
    if _always(recent, "completions/clipped_ratio", 1.0):
        yield (
            f"every completion of the last {len(recent)} steps was cut off by its budget: raise "
            "sampling.max_completion_length, and see that the model ends its answers (chat "
            "template, end-of-text token). If a fixed length is meant, all is well"
        )


def _dropping(recent: Sequence[Metrics], recipe: Recipe) -> Iterator[str]:
    dropped = _sum(recent, "dropped")
    failed = _sum(recent, "dropped/failed_score")
    groups = dropped + len(recent) * recipe.sampled_per_step
    if failed / groups > FAILED_SHARE:
        yield (
            f"scores fail: {failed:.0f} of the last {groups:.0f} groups were dropped for want of a "
            "score; the reasons are under `detail` in groups.jsonl"
        )
    elif dropped / groups > DROPPED_SHARE:
        yield (
            f"{dropped:.0f} of the last {groups:.0f} groups were dropped, so most of what is "
            "sampled is wasted; the reasons are under `dropped` in groups.jsonl"
        )


def _drifting(recent: Sequence[Metrics], recipe: Recipe) -> Iterator[str]:
    gap, limit = recent[-1].get("log_prob_gap"), recipe.alarms.log_prob_gap
    if gap is not None and gap > GAP_SHARE * limit:
        yield (
            f"rollout engine and learner differ by {gap:.1e} in the log-probability of a token; "
            f"alarms.log_prob_gap ends the run at {limit:g}. `covey selftest` tells why"
        )


def _slow(steps: Sequence[Metrics]) -> Iterator[str]:
    rates = [rate for step in steps if (rate := step.get("perf/throughput")) is not None]
    if len(rates) < LONG_ENOUGH:
        return
    usual, now = median(rates), median(rates[-RECENT_STEPS:])
    if now < COLLAPSED * usual:
        yield (
            f"throughput has collapsed: {now:,.0f} tokens/s over the last {RECENT_STEPS} steps, "
            f"{usual:,.0f} usually. Look which of timing_s/* has grown in metrics.jsonl, for "
            "workers that were lost, and for other load on the machines"
        )


def _always(steps: Sequence[Metrics], name: str, value: float) -> bool:
    return all(step.get(name) == value for step in steps)


def _sum(steps: Sequence[Metrics], name: str) -> float:
    return sum(step.get(name) or 0.0 for step in steps)  # absent: none was dropped for it
