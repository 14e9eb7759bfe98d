"""Pairs of a better and a worse answer, or step, as rows for a DPO stage.

Refuses to know the loss (`dpo`) and when the stage runs. Shapes: T tokens, G rollouts in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grpo.answer_quality import Quality, answer_qualities
from grpo.pipeline import RewardedGroup, State
from grpo.rewards import total_outcome
from grpo.search import SearchSettings, step_pairs
from grpo.trees import last_piece_start
from grpo.types import Bool, Group, Origin, Rollout, TrainRow

# A pair's number is group * this + its place among the group's pairs: unique in a run.
PAIRS_PER_GROUP = 1024

Collect = Callable[[RewardedGroup, State], tuple[TrainRow, ...]]


def step_pair_rows(
    item: RewardedGroup, state: State, *, settings: SearchSettings, pairs_per_update: int
) -> tuple[TrainRow, ...]:
    """The pairs of a group's search; only the step that they differ by is trained."""
    group = item.group
    return tuple(
        row
        for number, pair in enumerate(step_pairs(group, settings))
        for row in pair_rows(
            group,
            pair.better,
            pair.worse,
            number=number,
            doubt=pair.doubt,
            masks=[_last_piece(rollout) for rollout in group.rollouts],
            pairs_per_update=pairs_per_update,
        )
    )


def answer_pair_rows(
    item: RewardedGroup,
    state: State,
    *,
    outcomes: Mapping[str, float],
    consistency_scorer: str | None,
    ngram: int,
    max_repetition: float,
    min_tokens: int,
    pairs_per_update: int,
) -> tuple[TrainRow, ...]:
    """VerIPO's pairs of a group: a good answer against a bad and against an inconsistent one."""
    qualities = answer_qualities(
        item.group,
        right=total_outcome(item.group, weights=outcomes) > 0,
        consistency_scorer=consistency_scorer,
        ngram=ngram,
        max_repetition=max_repetition,
        min_tokens=min_tokens,
    )
    return tuple(
        row
        for number, (better, worse) in enumerate(answer_pairs(item.group, qualities))
        for row in pair_rows(
            item.group,
            better,
            worse,
            number=number,
            doubt=0.0,
            masks=[rollout.origins == Origin.POLICY for rollout in item.group.rollouts],
            pairs_per_update=pairs_per_update,
        )
    )


def pair_metrics(
    groups: Sequence[RewardedGroup], state: State, *, collect: Collect
) -> Mapping[str, float]:
    """How many pairs a group leaves for the stage."""
    counts = [len(collect(item, state)) / 2 for item in groups]
    return {
        "pairs/mean": float(np.mean(counts)),
        "pairs/frac_without": float(np.mean([count == 0 for count in counts])),
    }


def answer_pairs(group: Group, qualities: Sequence[Quality]) -> tuple[tuple[int, int], ...]:
    """(better, worse) of each family that has both sides; VerIPO, arXiv:2505.19000, reconstructed.

    Better: right, consistent, not repetitive, within the limits, the longest such answer. Worse: of
    the penalty family the lowest in rank (wrong, then inconsistent, then repetitive or too short
    or cut off) but those that are only inconsistent; of the consistency family a right answer that
    only lacks consistency. No good answer: no pair.
    """
    good = [place for place, quality in enumerate(qualities) if quality.is_good]
    if not good:
        return ()
    best = max(good, key=lambda place: group.rollouts[place].num_tokens)
    families = penalty_rejects(qualities), consistency_rejects(qualities)
    return tuple((best, rejects[0]) for rejects in families if rejects)


def penalty_rejects(qualities: Sequence[Quality]) -> list[int]:
    """Wrong, repetitive, too short or cut-off answers, the lowest in rank first."""
    found = [place for place, quality in enumerate(qualities) if quality.is_penalised]
    return sorted(found, key=lambda place: qualities[place].rank)


def consistency_rejects(qualities: Sequence[Quality]) -> list[int]:
    """Answers that lack nothing but consistency."""
    return [
        place
        for place, quality in enumerate(qualities)
        if not quality.is_penalised and not quality.is_consistent
    ]


def pair_rows(
    group: Group,
    better: int,
    worse: int,
    *,
    number: int,
    doubt: float,
    masks: Sequence[Bool],
    pairs_per_update: int,
) -> tuple[TrainRow, ...]:
    """The two rows of a pair, labelled for `dpo.preference_advantages`.

    DPO sums over tokens: each weighs 1 / pairs of an update, however long its answer is.
    """
    assert number < PAIRS_PER_GROUP
    labels = (1.0 - doubt, doubt - 1.0)
    if not (masks[better].any() and masks[worse].any()):
        return ()
    return tuple(
        _row(
            group.rollouts[place],
            group=group.id * PAIRS_PER_GROUP + number,
            index=index,
            weights=masks[place] / pairs_per_update,
            label=label,
        )
        for index, (place, label) in enumerate(zip((better, worse), labels, strict=True))
    )


def _row(
    rollout: Rollout, *, group: int, index: int, weights: np.ndarray, label: float
) -> TrainRow:
    return TrainRow(
        group=group,
        index=index,
        context=rollout.context if rollout.train_context is None else rollout.train_context,
        tokens=rollout.tokens,
        weights=weights.astype(np.float32),
        advantages=np.full(rollout.num_tokens, label, np.float32),
        policy_weights=np.ones(rollout.num_tokens, np.float32),
        behaviour_log_probs=rollout.log_probs,
        versions=rollout.versions,
        origins=rollout.origins,
        is_cross_context=rollout.train_context is not None,
    )


def _last_piece(rollout: Rollout) -> Bool:
    is_own: Bool = rollout.origins == Origin.POLICY
    return is_own & (np.arange(rollout.num_tokens) >= last_piece_start(rollout))
