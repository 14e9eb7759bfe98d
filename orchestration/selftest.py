"""Training at rate 0: whatever moves then is a fault of the learner, the weight sync or the engine.

    sample the same requests -> train at rate 0 -> publish -> load -> and again

Drives an engine and a learner through their Protocols; refuses to know scorers, pipelines and
where anything runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo.batch import plain_rows
from grpo.engines import PolicyLearner, RolloutEngine
from grpo.types import DType, Group, Prompt, Rollout, SampleRequest, TrainBatch, TrainRow
from orchestration.config import Recipe
from orchestration.group_task import rollout_seed
from orchestration.weight_sync import Agreement, agreement, sync_weights

MAX_GROUPS = 4  # a few hundred tokens already tell a wrong tensor from rounding
# Adapters begin at zero, where a sync that loses them would not be seen: one step moves them away
# at this rate, whose Adam steps are as large.
FIRST_ADAPTER_RATE = 1e-2
# The mean difference may grow by this factor and this much: other tokens round differently.
GROWTH = 1.5
ROUNDING: dict[DType, float] = {"float32": 1e-5, "bfloat16": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestStep:
    """One round of the loop."""

    step: int
    gap: Agreement  # engine against learner, before the step's sync
    checksum: int  # of the weights that the step published
    num_equal: int  # rollouts that are those of step 1, token for token
    num_rollouts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestReport:
    """All steps, the state after the last sync, and what moved; nothing: passed."""

    steps: tuple[SelftestStep, ...]
    after: Agreement
    moved: tuple[str, ...]

    @property
    def has_passed(self) -> bool:
        return not self.moved


def selftest_recipe(recipe: Recipe) -> Recipe:
    """The same engine and learner at rate 0, with adapters from the second step on; no scorers."""
    rate: dict[str, object] = {"learning_rate": 0.0}
    if recipe.learner.lora is not None:  # falls from this rate to 0 in a run of one step
        rate = {
            "learning_rate": FIRST_ADAPTER_RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
        }
    learner = recipe.learner.model_copy(update=rate)
    return recipe.model_copy(update={"learner": learner, "scorers": (), "steps": 1})


def selftest_requests(
    recipe: Recipe, prompt_at: Callable[[int], Prompt]
) -> list[list[SampleRequest]]:
    """A few groups of the recipe's size and sampling, at least one rollout for each rank."""
    size = recipe.num_generations
    count = max(min(recipe.num_prompts_per_step, MAX_GROUPS), -(-recipe.learner.ranks // size))
    return [
        [
            SampleRequest(
                group=group,
                index=index,
                context=prompt_at(group).tokens,
                guidance=np.zeros(0, np.int32),
                sampling=recipe.sampling.drawn(),
                seed=rollout_seed(recipe.seed, group, 0, index),
            )
            for index in range(size)
        ]
        for group in range(count)
    ]


async def selftest(
    recipe: Recipe,
    engine: RolloutEngine,
    learner: PolicyLearner,
    requests: Sequence[Sequence[SampleRequest]],
    *,
    steps: int,
    on_step: Callable[[SelftestStep], None],
) -> SelftestReport:
    """Run the loop so many times, then look once more."""
    done: list[SelftestStep] = []
    first: list[Rollout] = []
    before: list[list[float]] = []
    rows: list[TrainRow] = []
    if recipe.learner.rounds_base:  # else the engine has read what the learner begins with
        await sync_weights(learner, engine, 0)
    first_at_rest = 1 if recipe.learner.lora is None else 2
    for step in range(1, steps + 1):
        groups = await asyncio.gather(*[engine.sample(group) for group in requests])
        rollouts = [rollout for group in groups for rollout in group]
        gap = await agreement(learner, rollouts)
        if step == 1:
            first = rollouts
        if step == first_at_rest:
            rows = _rows(groups)
            before = await learner.log_probs(rows)
        await learner.train(
            TrainBatch(step=step, version=step - 1, updates=(tuple(_rows(groups)),))
        )
        sync = await sync_weights(learner, engine, step)
        done.append(
            SelftestStep(
                step=step,
                gap=gap,
                checksum=sync.ref.checksum,
                num_equal=sum(_is_same(a, b) for a, b in zip(first, rollouts, strict=True)),
                num_rollouts=len(rollouts),
            )
        )
        on_step(done[-1])
    groups = await asyncio.gather(*[engine.sample(group) for group in requests])
    after = await agreement(learner, [rollout for group in groups for rollout in group])
    drift = _largest(before, await learner.log_probs(rows)) if before else 0.0
    limit = recipe.alarms.log_prob_gap
    moved = (
        *_moved_policy(done, drift),
        *_moved_gap(done, after, dtype=recipe.learner.rollout_dtype, limit=limit),
    )
    return SelftestReport(steps=tuple(done), after=after, moved=moved)


def _moved_policy(steps: Sequence[SelftestStep], drift: float) -> list[str]:
    """What the learner did to its weights."""
    found = []
    changed = [step for step in steps if step.checksum != steps[0].checksum]
    if changed:
        found.append(
            f"the policy moved: step {steps[0].step} published weights with checksum "
            f"{steps[0].checksum:016x}, step {changed[0].step} with {changed[0].checksum:016x}, "
            "although the learning rate is 0"
        )
    if drift != 0:
        found.append(
            f"the learner's own log-probabilities of the rollouts of step 1 moved by up to "
            f"{drift:.1e} between the first step and the last"
        )
    return found


def _moved_gap(
    steps: Sequence[SelftestStep], after: Agreement, *, dtype: DType, limit: float
) -> list[str]:
    """How engine and learner came to differ."""
    start = steps[0].gap.mean
    if not start <= limit:
        return [
            f"engine and learner differ before any step: by {start:.1e} on average, and "
            f"alarms.log_prob_gap allows {limit:g}. They compute another policy from the same "
            "files (dtype, attention, rope or temperature)"
        ]
    allowed = min(limit, GROWTH * start + ROUNDING[dtype])
    later = [(f"of step {step.step - 1}", step.gap) for step in steps[1:]]
    for which, gap in [*later, (f"of step {steps[-1].step}", after)]:
        if not gap.mean <= allowed:
            return [
                f"the difference moved: {start:.1e} in step 1, {gap.mean:.1e} after the sync "
                f"{which} (up to {allowed:.1e} is rounding); the largest is {gap.max:.1e}, the KL "
                f"{gap.kl:.1e}. What arrived had the right checksum, so the engine does not hold "
                "what the learner trains: a tensor is published, named or loaded wrongly"
            ]
    return []


def _rows(groups: Sequence[Sequence[Rollout]]) -> list[TrainRow]:
    """Rows with advantages 1 and -1 in turn: at rate 0 any gradient will do, but for none."""
    rows: list[TrainRow] = []
    prompt = Prompt(id="selftest", text="", tokens=np.zeros(1, np.int32))
    for number, rollouts in enumerate(groups):
        for row in plain_rows(Group(id=number, prompt=prompt, rollouts=tuple(rollouts))):
            sign = np.float32(1 - 2 * (row.index % 2))
            rows.append(replace(row, advantages=row.advantages + sign))
    total = np.float32(sum(len(row.tokens) for row in rows))
    return [replace(row, weights=row.weights / total) for row in rows]


def _is_same(a: Rollout, b: Rollout) -> bool:
    return np.array_equal(a.tokens, b.tokens)


def _largest(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> float:
    gaps = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(before, after, strict=True)]
    return float(max(gaps))
