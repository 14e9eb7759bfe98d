"""From a group to its line in groups.jsonl: everything needed to ask later why it was what it was.

Pure functions from records to JSON values; refuses to know files, clocks and which algorithm ran.
Numbers are rounded to what they can mean, because a group of long answers is a megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from grpo.pipeline import RewardedGroup
from grpo.types import Bool, Group, Origin, Prompt, Rollout, Score, TrainRow
from orchestration.group_task import DroppedGroup, GroupTimes

# Log-probabilities of engine and learner agree to about 1e-6 in float32 at best.
LOG_PROB_DECIMALS = 6
# Rewards, advantages and weights: what float32 holds with some room.
SIGNIFICANT_DIGITS = 7
LARGEST_POWER = 51  # as the smallest float32, 1e-45, takes; above 22 not exact: more digits
# Comparing an array with a member of an enum takes six times as long.
POLICY, GUIDANCE = int(Origin.POLICY), int(Origin.GUIDANCE)

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def trained_record(
    rewarded: RewardedGroup,
    rows: Sequence[TrainRow],
    *,
    terms: Sequence[str],
    times: GroupTimes,
    trained: float,
    is_replayed: bool = False,
) -> dict[str, Json]:
    """A group that was trained on. `terms` names the columns of the rewards.

    A rollout without a row among `rows` was left out of training and has no advantage or weight.
    """
    group = rewarded.group
    row_of = {row.index: row for row in rows if row.group == group.id}
    rewards = rewarded.rewards.tolist()
    rollouts: list[Json] = []
    for place, rollout in enumerate(group.rollouts):
        record = _rollout_record(group, place)
        values = zip(terms, rewarded.components[place].tolist(), strict=True)
        record["rewards"] = {term: rounded(value) for term, value in values if value == value}
        record["reward"] = rounded(rewards[place])
        if rollout.index in row_of:
            record["advantage"] = _one_or_all(row_of[rollout.index].advantages)
            record["weight"] = _one_or_all(row_of[rollout.index].weights)
        rollouts.append(record)
    return {
        "group": group.id,
        **({"replayed": True} if is_replayed else {}),
        "prompt": _prompt_record(group.prompt),
        "times": {**_times_record(times), "trained": round(trained, 3)},
        "rollouts": rollouts,
    }


def dropped_record(fallen: DroppedGroup) -> dict[str, Json]:
    """A group that was not trained on: the reason, and as much of it as came to be."""
    group = fallen.group
    return {
        "group": group.id,
        "dropped": fallen.dropped.reason,
        "detail": fallen.dropped.detail,
        "prompt": _prompt_record(group.prompt),
        "times": _times_record(fallen.times),
        "rollouts": [_rollout_record(group, place) for place in range(len(group.rollouts))],
    }


def rounded(value: float) -> float | None:
    """The value to seven significant digits; None where it is no number."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def all_rounded(values: NDArray[np.float32]) -> list[Json]:
    """The same for an array, without a text for each number.

    1.2345678e-3 has its first digit at 10^-3, so it is round(1.2345678e-3 * 10^9) / 10^9.
    """
    wide = values.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 and NaN have no first digit
        first = np.floor(np.log10(np.abs(wide)))
        scale = 10.0 ** np.minimum(SIGNIFICANT_DIGITS - 1 - first, LARGEST_POWER)
        found: list[float] = (np.rint(wide * scale) / scale).tolist()
    if np.isfinite(wide).all():
        return [*found]
    return [value if math.isfinite(value) else None for value in found]


def _prompt_record(prompt: Prompt) -> dict[str, Json]:
    return {
        "id": prompt.id,
        "text": prompt.text,
        "reference": prompt.reference,
        "domain": prompt.domain,
        "num_tokens": len(prompt.tokens),
        "tokens": prompt.tokens.tolist(),
    }


def _times_record(times: GroupTimes) -> dict[str, Json]:
    return {
        "admitted": round(times.admitted, 3),
        "generated": round(times.generated, 3),
        "scored": round(times.scored, 3),
    }


def _rollout_record(group: Group, place: int) -> dict[str, Json]:
    rollout = group.rollouts[place]
    is_guidance = rollout.origins == GUIDANCE
    log_probs = np.round(rollout.log_probs.astype(np.float64), LOG_PROB_DECIMALS)
    record: dict[str, Json] = {
        "index": rollout.index,
        "text": rollout.text,
        "finish_reason": rollout.finish_reason.value,
        "versions": _version_range(rollout),
        "num_guidance_tokens": int(np.count_nonzero(is_guidance)),
        "tokens": rollout.tokens.tolist(),
        "log_probs": log_probs.tolist(),
    }
    record.update(_score_records(group.scores, place, rollout.num_tokens))
    if not np.array_equal(rollout.context, group.prompt.tokens):
        record["context"] = rollout.context.tolist()
    record.update(_special_records(rollout, is_guidance))
    return record


def _special_records(rollout: Rollout, is_guidance: Bool) -> dict[str, Json]:
    """What only some algorithms' rollouts have, under the names of `covey schema group`."""
    records: dict[str, Json] = {}
    if is_guidance[np.count_nonzero(is_guidance) :].any():  # elsewhere than at the beginning
        records["origins"] = ["guidance" if given else "policy" for given in is_guidance]
    if rollout.train_context is not None:
        records["train_context"] = rollout.train_context.tolist()
    if rollout.lineage:
        records["lineage"] = [{"id": piece.id, "end": piece.end} for piece in rollout.lineage]
    if rollout.measured:
        records["measured"] = {n: _one_or_all(v) for n, v in rollout.measured.items()}
    return records


def _version_range(rollout: Rollout) -> list[Json] | None:
    """Oldest and newest weights that sampled a token; None: nothing was sampled."""
    sampled = rollout.versions[rollout.origins == POLICY]
    return [int(sampled.min()), int(sampled.max())] if len(sampled) else None


def _score_records(scores: Sequence[Score], place: int, num_tokens: int) -> Mapping[str, Json]:
    """Whole-answer scores by scorer, span scores as [start, end, value], failures as text."""
    whole: dict[str, Json] = {}
    spans: dict[str, list[Json]] = {}
    failures: dict[str, Json] = {}
    for score in scores:
        span = score.span
        if span.rollout != place:
            continue
        value = None if score.value is None else rounded(score.value)
        if score.failure is not None:
            failures[score.scorer] = score.failure
        elif span.start == 0 and span.end == num_tokens:
            whole[score.scorer] = value
        else:
            spans.setdefault(score.scorer, []).append([span.start, span.end, value])
    records: dict[str, Json] = {"scores": whole}
    if spans:
        records["span_scores"] = dict(spans)
    if failures:
        records["failures"] = failures
    return records


def _one_or_all(values: NDArray[np.float32]) -> Json:
    """One number where all tokens share it, else one per token."""
    if len(values) and (values == values[0]).all():
        return rounded(float(values[0]))
    return all_rounded(values)
