"""The small engine: log-probabilities, seeds, guidance, versions and weights of its rollouts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo.errors import PromptTooLong, WeightMismatch
from grpo.types import FinishReason, Origin
from rollout_workers.config import RolloutConfig
from rollout_workers.transformers_engine import TransformersEngine
from tests.unit.rollout_models import (
    EOS_ID,
    MAX_MODEL_LEN,
    bundle,
    expected_log_probs,
    largest_gap,
    make_model,
    policy,
    requests,
)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@asynccontextmanager
async def started(model: str, *, max_concurrent: int = 64) -> AsyncIterator[TransformersEngine]:
    config = RolloutConfig(engine="transformers", max_concurrent_rollouts=max_concurrent)
    engine = TransformersEngine(model, config, MAX_MODEL_LEN)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def test_log_probs_are_those_of_the_learner_at_any_temperature(tied: str) -> None:
    async def main() -> None:
        async with started(tied) as engine:
            for temperature in (1.0, 0.6):
                rollouts = await engine.sample(requests(6, temperature=temperature))
                gap = largest_gap(policy(tied, seed=0), rollouts, temperature=temperature)
                assert gap < 1e-4

    asyncio.run(main())


def test_calls_of_one_moment_run_together_from_their_first_token_on(tied: str) -> None:
    """Bit for bit, whatever the thread is doing: who is beside whom is not left to chance."""

    async def main() -> None:
        wanted = requests(8)
        async with started(tied) as engine:
            as_one = await engine.sample(wanted)
            for _ in range(5):
                calls = [engine.sample(wanted[i : i + 2]) for i in range(0, 8, 2)]
                apart = [rollout for part in await asyncio.gather(*calls) for rollout in part]
                for one, other in zip(as_one, apart, strict=True):
                    assert one.tokens.tolist() == other.tokens.tolist()
                    assert one.log_probs.tolist() == other.log_probs.tolist()

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the engine's thread takes over wherever it can
    try:
        asyncio.run(main())
    finally:
        sys.setswitchinterval(usual)


def test_a_rollout_depends_on_its_seed_and_not_on_its_company(tied: str) -> None:
    async def main() -> None:
        wanted = requests(8)
        async with started(tied) as engine:
            together = await engine.sample(wanted)
            alone = [(await engine.sample([request]))[0] for request in wanted]
            reseeded = await engine.sample(requests(8, seed=1))
        async with started(tied, max_concurrent=3) as engine:
            in_turns = await engine.sample(wanted)
        for one, other in zip(together * 2, alone + in_turns, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
        assert any(
            one.tokens.tolist() != other.tokens.tolist()
            for one, other in zip(together, reseeded, strict=True)
        )

    asyncio.run(main())


def test_guidance_comes_first_counts_and_is_not_the_policy_s(tied: str) -> None:
    async def main() -> None:
        async with started(tied) as engine:
            rollouts = await engine.sample(requests(4, guidance=(65, 66, 67), max_tokens=10))
        for rollout in rollouts:
            assert rollout.tokens[:3].tolist() == [65, 66, 67]
            assert rollout.origins[:3].tolist() == [Origin.GUIDANCE] * 3
            assert rollout.versions[:3].tolist() == [-1] * 3
            assert rollout.log_probs[:3].tolist() == [0.0] * 3
            assert (rollout.origins[3:] == Origin.POLICY).all()
            assert rollout.num_tokens <= 10
        assert largest_gap(policy(tied, seed=0), rollouts) < 1e-4

    asyncio.run(main())


def test_guidance_that_ends_the_answer_leaves_nothing_to_sample(tied: str) -> None:
    async def main() -> None:
        async with started(tied) as engine:
            (rollout,) = await engine.sample(requests(1, guidance=(65, EOS_ID), max_tokens=2))
        assert rollout.tokens.tolist() == [65, EOS_ID]
        assert rollout.finish_reason is FinishReason.STOP

    asyncio.run(main())


def test_what_does_not_fit_is_refused_before_anything_is_sampled(tied: str) -> None:
    async def main() -> None:
        async with started(tied) as engine:
            with pytest.raises(PromptTooLong, match="needs 505 tokens"):
                await engine.sample(requests(2, max_tokens=500))
            with pytest.raises(PromptTooLong, match="guidance of 4 tokens"):
                await engine.sample(requests(2, max_tokens=4, guidance=(1, 2, 3, 4)))

    asyncio.run(main())


def test_a_completion_ends_with_the_end_token_or_with_its_budget(tied: str) -> None:
    async def main() -> None:
        async with started(tied) as engine:
            rollouts = await engine.sample(requests(40, max_tokens=60))
        assert {rollout.finish_reason for rollout in rollouts} == set(FinishReason)
        for rollout in rollouts:
            ended = rollout.tokens[-1] == EOS_ID
            assert ended == (rollout.finish_reason is FinishReason.STOP)
            assert ended or rollout.num_tokens == 60
            assert EOS_ID not in rollout.tokens[:-1]

    asyncio.run(main())


@pytest.mark.parametrize("is_tied", [True, False])
def test_loaded_weights_are_the_policy_from_then_on(tmp_path: Path, is_tied: bool) -> None:
    async def main() -> None:
        folder = make_model(tmp_path, tied=is_tied)
        other = policy(folder, seed=1)
        async with started(folder) as engine:
            report = await engine.load_weights(bundle(other, 7))
            rollouts = await engine.sample(requests(6))
        assert report.version == 7
        assert largest_gap(other, rollouts) < 1e-4
        assert {int(version) for rollout in rollouts for version in rollout.versions} == {7}

    asyncio.run(main())


def test_every_token_carries_the_weights_that_sampled_it_across_swaps(tied: str) -> None:
    policies = [policy(tied, seed=seed) for seed in range(3)]

    async def main() -> None:
        async with started(tied) as engine:
            running = asyncio.create_task(engine.sample(requests(6, max_tokens=200)))
            for version in range(1, 30):
                await engine.load_weights(bundle(policies[version % 3], version))
            rollouts = await running
        assert max(len(set(rollout.versions.tolist())) for rollout in rollouts) > 2
        for rollout in rollouts:
            assert (np.diff(rollout.versions) >= 0).all()
            gaps = [np.abs(expected_log_probs(p, rollout) - rollout.log_probs) for p in policies]
            own = np.choose(rollout.versions % 3, gaps)
            assert own.max() < 1e-4

    asyncio.run(main())


def test_damaged_or_foreign_weights_are_refused_and_the_old_ones_stay(tied: str) -> None:
    model = policy(tied, seed=1)

    async def main() -> None:
        good = bundle(model, 1)
        async with started(tied) as engine:
            with pytest.raises(WeightMismatch, match="xxh3"):
                await engine.load_weights(replace(good, checksum=good.checksum ^ 1))
            del model.model.norm.weight
            with pytest.raises(WeightMismatch, match=r"missing \['model.norm.weight'\]"):
                await engine.load_weights(bundle(model, 1))
            rollouts = await engine.sample(requests(2))
        assert largest_gap(policy(tied, seed=0), rollouts) < 1e-4

    asyncio.run(main())


def test_a_cancelled_call_leaves_the_engine_to_the_others(tied: str) -> None:
    async def main() -> None:
        async with started(tied, max_concurrent=4) as engine:
            given_up = asyncio.create_task(engine.sample(requests(4, max_tokens=200)))
            wanted = asyncio.create_task(engine.sample(requests(4, seed=1)))
            await engine.load_weights(bundle(policy(tied, seed=0), 1))  # both have begun
            given_up.cancel()
            assert len(await wanted) == 4
            with pytest.raises(asyncio.CancelledError):
                await given_up

    asyncio.run(main())
