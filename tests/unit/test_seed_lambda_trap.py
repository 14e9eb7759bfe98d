"""The synthetic trap of the lambda-GRPO paper: which paths are bait and which are poisoned."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.lambda_trap import DEPTH, Table, Trap, path_log_probs

TARGET = (0, 0, 1, 0)  # L L R L
PATHS = list(itertools.product((0, 1), repeat=DEPTH))


def test_the_targets_neighbours_are_poisoned_and_its_beginning_looks_bad():
    trap = Trap(target=TARGET, prefix=1, negative=-1.0)
    rewards = {path: trap.reward(path) for path in PATHS}
    assert sorted(rewards.values()) == [-1.0] * 7 + [0.7] * 8 + [1.0]
    assert rewards[TARGET] == 1.0
    assert np.mean(list(rewards.values())) == pytest.approx(-0.025)  # a policy that knows nothing
    assert np.mean([r for path, r in rewards.items() if path[0] == 0]) == pytest.approx(-0.75)


def test_a_longer_common_beginning_poisons_fewer_paths():
    trap = Trap(target=TARGET, prefix=2, negative=-1.0)
    assert sum(trap.reward(path) == -1.0 for path in PATHS) == 3


def test_the_table_has_a_pair_of_logits_for_each_prefix_and_no_other():
    table = Table()
    torch.manual_seed(0)
    torch.nn.init.normal_(table.logits)
    log_probs = path_log_probs(table, torch.tensor(PATHS))
    assert log_probs.sum(dim=1).exp().sum().item() == pytest.approx(1)
    for t in range(DEPTH):
        rows = {path[: t + 1]: round(log_probs[i, t].item(), 6) for i, path in enumerate(PATHS)}
        assert len(rows) == len(set(rows.values())) == 2 ** (t + 1)
        assert all(
            round(log_probs[i, t].item(), 6) == rows[path[: t + 1]] for i, path in enumerate(PATHS)
        )
