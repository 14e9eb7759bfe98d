"""Each algorithm with its own idea switched off is its base, to the last bit.

Rows and gradients are compared on groups whose answers differ in everything. Where the idea is
where it acts and has no switch, the groups are such that it has nothing to act on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from grpo import advantage
from grpo.algorithms import ALGORITHMS
from grpo.types import Group
from tests.unit.family_cases import halves, loss_and_gradient, row_inputs, rows_of
from tests.unit.grpo_groups import rollout, scored


def mixed(seed: int = 0, *, lengths: tuple[int, ...] = (3, 7, 2, 5)) -> list[Group]:
    """Three groups of two right and two wrong answers."""
    rng = np.random.default_rng(seed)
    return [
        scored(
            [
                rollout(i, n, log_probs=-rng.random(n))
                for i, n in enumerate(rng.permutation(lengths))
            ],
            group=number,
            answer=rng.permutation([1.0, 1.0, 0.0, 0.0]).tolist(),
        )
        for number in range(3)
    ]


def alike() -> list[Group]:
    return mixed(lengths=(5, 5, 5, 5))


def single_tokens() -> list[Group]:
    return mixed(lengths=(1, 1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Neutral:
    """Settings that switch an algorithm's own idea off, and what is left of it."""

    base: str
    settings: dict[str, object] = field(default_factory=dict)
    base_settings: dict[str, object] = field(default_factory=dict)
    groups: Callable[[], list[Group]] = mixed
    spread: float = 0.3  # of the policy around the one that sampled; 0: on policy
    points: dict[str, object] = field(default_factory=dict)  # of the base's pipeline


def one_group() -> list[Group]:
    return alike()[:1]


SELF = {
    "grpo": "is the base",
    "dr_grpo": "is a base: the mean alone, over a fixed length",
    "rloo": "is a base: the mean of the others",
    "reinforce_pp": "is a base: whitened over the tokens of the step",
    "gpg": "is a base: log-likelihood",
    "raft": "is a base: imitation",
    "reinforce_rej": "is a base: 1 and -1",
    "disco": "is a base: scores against scores",
    "rebel": "is a base: regression",
    "mcts_dpo": "is a base: no update but DPO's",
    "gdpo": "has no switch: the second norm rescales even a single reward",
    "disco_scaling": "has no switch: every reward is divided by the group's mean",
    "treerl": "is a base: values of a tree's nodes",
    "spo_chain": "is a base: gains of segments, over uncertain tokens",
}
PLAIN_DAPO = {
    "dynamic_sampling": False,
    "mask_truncated_completions": False,
    "soft_overlong_cache": 0,
    "epsilon_high": None,
}
NEUTRAL = {
    "dapo": Neutral(base="grpo", settings=PLAIN_DAPO, groups=alike),
    "bnpo": Neutral(base="dapo", base_settings=PLAIN_DAPO),
    "lambda_grpo_prm": Neutral(
        base="grpo", settings={"loss_scale": "none", "aggregation": "sequence_mean"}
    ),
    "g2rpo_a": Neutral(base="grpo", settings={"guided_fraction": 0.0}),
    "ws_grpo": Neutral(
        base="grpo",
        settings={"outcome_coef": 1.0, "range_penalty": 0.0, "truncated_is_wrong": False},
    ),
    "sgpo": Neutral(base="grpo"),
    "gspo": Neutral(
        base="grpo", base_settings={"epsilon": 3e-4, "epsilon_high": 4e-4}, groups=single_tokens
    ),
    "gspo_token": Neutral(base="gspo", groups=single_tokens),
    "cispo": Neutral(base="dapo", base_settings=PLAIN_DAPO, spread=0.0),
    "sapo": Neutral(base="grpo", settings={"tau_negative": 1.0}, spread=0.0),
    "reinforce_pp_baseline": Neutral(base="reinforce_pp", groups=alike),
    "raft_pp": Neutral(base="raft", spread=0.0),
    "pods": Neutral(base="grpo", settings={"num_kept": 4}),
    "gfpo": Neutral(base="dapo", settings={"num_kept": 4, "std_ddof": 1}, base_settings=PLAIN_DAPO),
    "unlikeliness": Neutral(base="grpo", settings={"rank_coef": 0.0, "beta": 0.0, "std_eps": 1e-4}),
    "tr_grpo": Neutral(base="dapo", settings={"low": 1.0, "high": 1.0}, base_settings=PLAIN_DAPO),
    "grpo_lambda": Neutral(base="grpo", settings={"decay": 1.0, "advantage_floor": None}),
    "grpo_robust": Neutral(base="grpo"),
    "lite_ppo": Neutral(base="dapo", base_settings=PLAIN_DAPO, groups=one_group),
    "grpo_invariant": Neutral(base="grpo"),
    "nthr": Neutral(base="grpo", settings={"eta": "one", "std_ddof": 1, "beta": 0.0}),
    "thr": Neutral(base="grpo", settings={"steer": 0.0, "mask": False}),
    "tw_grpo": Neutral(base="dapo", settings={"alpha": 1.0}, base_settings=PLAIN_DAPO),
    "high_entropy": Neutral(base="dapo", settings={"entropy_share": 1.0}),
    "lambda_grpo_length": Neutral(base="dapo", base_settings=PLAIN_DAPO),
    "grpo_care": Neutral(base="grpo", settings={"bonus_coef": 0.0}),
    "multi_label": Neutral(base="grpo"),
    "igrpo": Neutral(base="grpo", settings={"num_drafts": 0}),
    "guide": Neutral(
        base="dapo",
        settings={"hint_column": None, "std_eps": 1e-4},
        base_settings=PLAIN_DAPO | {"dynamic_sampling": True},
    ),
    "luffy": Neutral(
        base="dr_grpo", settings={"num_demonstrations": 0, "clip": True, "entropy_coef": 0.0}
    ),
    "s_grpo": Neutral(
        base="grpo",
        settings={"early_exits": False},
        points={"advantage": advantage.centred},
    ),
    "srpo": Neutral(
        base="dapo",
        settings={"skip_solved": False, "truncated_advantage": True},
        base_settings=PLAIN_DAPO,
    ),
    "process_grpo": Neutral(base="grpo", settings={"beta": 0.0}),
    "prime": Neutral(base="reinforce_pp_baseline"),
    "treepo": Neutral(base="reinforce_pp_baseline", settings={"epsilon_high": None}),
    "spo_tree": Neutral(
        base="rloo",
        settings={"num_levels": 1, "shared_tokens": "each", "drop_equal_edges": False},
        base_settings={"ratio": "token", "beta": 0.0},
    ),
    "veripo": Neutral(base="grpo", settings={"dpo": False}),
}


def rows_and_gradient(name: str, settings: dict[str, object], case: Neutral, **points: object):
    pipeline, objective = halves(name, **{"num_generations": 4, **settings})
    pipeline = replace(pipeline, **points)
    rows = rows_of(pipeline, case.groups(), pipeline.initial_state)
    inputs = row_inputs(objective, rows, spread=case.spread)
    numbers = [np.concatenate([row.weights, row.advantages * row.policy_weights]) for row in rows]
    return numbers, loss_and_gradient(objective, inputs)[1]


def test_the_table_has_every_algorithm() -> None:
    assert sorted([*SELF, *NEUTRAL]) == sorted(ALGORITHMS)


@pytest.mark.parametrize("name", NEUTRAL)
def test_without_its_own_idea_an_algorithm_is_its_base_to_the_last_bit(name: str) -> None:
    case = NEUTRAL[name]
    ours = rows_and_gradient(name, case.settings, case)
    theirs = rows_and_gradient(case.base, case.base_settings, case, **case.points)
    for mine, its in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_array_equal(mine, its)
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert ours[1].any()
