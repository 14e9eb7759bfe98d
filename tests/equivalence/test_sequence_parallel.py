"""Ranks that share a line compute what one rank computes that holds all of it.

Ranks are forked, since importing what they need takes longer than all that they do.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load
from torch import Tensor

from learner.config import LearnerConfig
from learner.packing import Block, pack
from learner.policy import Policy, load_policy, policy_inputs
from learner.rank import attached
from learner.sequence_parallel import joined_groups
from tests.equivalence.learner_processes import Outcome, image_of, outcomes_of, steps
from tests.unit.learner_cases import random_rows, rank_of, save, torch_config, write_model

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=100)
RANKS = (2, 4)  # of a model with four heads and two key-value heads, which four ranks copy
CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "lora": {"lora": {"rank": 4}},
}
SETTINGS: dict[str, object] = {"learning_rate": 1e-3, "max_tokens_per_microbatch": 50}
TRAINED = {
    "two by two": {"zero_stage": 2, "sequence_parallel": 2, "ranks": 4},
    "four": {"zero_stage": 3, "sequence_parallel": 4, "ranks": 4},
}
Computed = dict[str, Tensor]

pytestmark = pytest.mark.slow


def blocks_of_unlike_length() -> dict[str, Block]:
    """47 tokens, of which neither two nor four ranks have as many; 2, which leave some none."""
    rows = random_rows(40)
    shortest = next(row for row in rows if len(row.tokens) == 1)
    blocks = {
        "rows": pack(rows[:5]),
        "two tokens": pack([replace(shortest, context=shortest.context[:1])]),
    }
    assert blocks["rows"].input_ids.numel() % 2 == 1
    return blocks


def computed(policy: Policy, block: Block) -> Computed:
    """Everything a pass gives, a loss of all of it, and this rank's part of the gradient."""
    outputs = policy(**policy_inputs(block, CPU), with_entropy=True, with_hidden=True)
    names = ("log_probs", "entropy", "hidden")
    found = dict(zip(names, outputs, strict=True))
    loss = sum(
        (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum()
        for values in found.values()
    )
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    parts = torch.autograd.grad(loss, weights)
    gradient = torch.cat([part.flatten() for part in parts])
    return {name: values.detach() for name, values in found.items()} | {"gradient": gradient}


def compared(model: str) -> list[str]:
    """By case and block: whole lines on this rank against lines shared by all ranks."""
    group, _ = joined_groups(torch.distributed.get_world_size(), timeout=TIMEOUT)
    wrong = []
    for case, settings in CASES.items():
        config = torch_config(**settings)
        policy = load_policy(model, config, temperature=0.8)
        policy.head.chunk_tokens = 5
        if config.lora is not None:
            torch.manual_seed(0)
            policy.adapters = attached(policy.model, config.lora, name=model)
            for weight in policy.adapters.weights():
                torch.nn.init.normal_(weight, std=0.1)
        for name, block in blocks_of_unlike_length().items():
            policy.sequence_group = None
            whole = computed(policy, block)
            policy.sequence_group = group
            shared = computed(policy, block)
            assert whole["gradient"].abs().max() > 0.1
            torch.distributed.all_reduce(shared["gradient"])
            for key, values in shared.items():
                if not torch.allclose(values, whole[key], atol=1e-4, rtol=1e-4):
                    gap = (values - whole[key]).abs().max()
                    wrong.append(f"{case}, {name}: {key} is off by {gap:.2g}")
    return wrong


def run_rank(rank: int, ranks: int, meeting: Path, model: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    wrong = compared(model)
    (meeting.parent / f"{ranks}_{rank}.txt").write_text("\n".join(wrong))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", RANKS)
def test_log_probs_entropy_hidden_states_and_gradient_are_those_of_whole_lines(
    ranks: int, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, tmp_path / "meeting", model))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    assert [(tmp_path / f"{ranks}_{rank}.txt").read_text() for rank in range(ranks)] == [""] * ranks


def run_steps(
    config: LearnerConfig, *, model: str, rank: int, master: str, folder: Path
) -> Outcome:
    """Two steps, saved after the first."""
    first, second = steps()
    learner = rank_of(model, config, rank=rank, master=master)
    metrics = [dict(learner.train(first).metrics)]
    save(learner, folder)
    metrics.append(dict(learner.train(second).metrics))
    log_probs = learner.log_probs(random_rows(5, seed=1))
    outcome = Outcome(metrics=metrics, log_probs=log_probs, image=image_of(learner))
    learner.close()
    return outcome


def run_alone(model: str, folder: Path, *, resumed_from: Path | None = None) -> Outcome:
    """The same on one rank; or its second step, from what others saved."""
    config = torch_config(**SETTINGS)
    before = dict(os.environ)
    try:
        if resumed_from is None:
            return run_steps(config, model=model, rank=0, master="127.0.0.1:1", folder=folder)
        learner = rank_of(model, config)
        learner.load(str(resumed_from))
        return Outcome(metrics=[dict(learner.train(steps()[1]).metrics)], image=image_of(learner))
    finally:
        os.environ.clear()
        os.environ.update(before)


def assert_same_weights(image: bytes, expected: bytes) -> None:
    weights, others = load(image), load(expected)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-5, rtol=0)


def test_deepspeed_ranks_that_share_lines_train_the_weights_of_one_and_it_goes_on_from_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    alone = run_alone(model, tmp_path / "alone")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from learner import deepspeed_backend  # noqa: F401  # seconds to import, once for all ranks

    configs = {name: LearnerConfig.model_validate(SETTINGS | own) for name, own in TRAINED.items()}
    of_ranks = outcomes_of(
        configs, ranks=4, model=model, folder=tmp_path, run=run_steps, start="fork"
    )
    for name in TRAINED:
        for outcomes in of_ranks:
            outcome = outcomes.get(name, Outcome(error="not run"))
            assert not outcome.error, outcome.error
            for metrics, expected in zip(outcome.metrics, alone.metrics, strict=True):
                assert metrics == pytest.approx(expected, abs=1e-4)
            for values, others in zip(outcome.log_probs, alone.log_probs, strict=True):
                assert values == pytest.approx(others, abs=1e-3)
        assert_same_weights(of_ranks[0][name].image, alone.image)
        resumed = run_alone(model, tmp_path, resumed_from=tmp_path / name)
        assert resumed.metrics[0] == pytest.approx(alone.metrics[1], abs=1e-4)
        assert_same_weights(resumed.image, alone.image)
