"""vLLM against transformers: the same policy, token for token, before, across and after swaps.

One engine for a model with a tied output layer and one without, each started once.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from grpo.errors import BadInput, PromptTooLong, UserError, WeightMismatch, WorkerLost
from grpo.types import FinishReason, Origin, Rollout
from rollout_workers.vllm_window import check_interfaces, check_version
from rollout_workers.worker import RolloutWorker
from tests.equivalence.served_worker import CONFIG, Served, serving
from tests.unit.rollout_models import (
    EOS_ID,
    MAX_MODEL_LEN,
    bundle,
    expected_log_probs,
    largest_gap,
    policy,
    requests,
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("model"), tied=request.param) as started:
        yield started
    with pytest.raises(WorkerLost):
        started.sample(requests(1))


@pytest.fixture(autouse=True)
def original_weights(served: Served) -> None:
    """Every test starts from the weights of the model's folder, as version 0."""
    asyncio.run(served.worker.load_weights(bundle(policy(served.model, seed=0), 0)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_learner(served: Served, temperature: float) -> None:
    rollouts = served.sample(requests(8, temperature=temperature))
    gap = largest_gap(policy(served.model, seed=0), rollouts, temperature=temperature)
    assert gap < 1e-4


def test_greedy_rollouts_take_the_likeliest_token(served: Served) -> None:
    rollouts = served.sample(requests(4, temperature=0.0))
    assert rollouts[0].tokens.tolist() == rollouts[1].tokens.tolist()  # seeds do not matter
    assert largest_gap(policy(served.model, seed=0), rollouts) < 1e-4


def test_truncated_sampling_reports_the_distribution_it_drew_from(served: Served) -> None:
    rollouts = served.sample(requests(4, top_k=1))
    assert all(np.abs(rollout.log_probs).max() == 0 for rollout in rollouts)  # certainty
    for rollout in served.sample(requests(4, top_p=0.5)):
        full = expected_log_probs(policy(served.model, seed=0), rollout)
        assert (rollout.log_probs >= full - 1e-4).all()
        assert (rollout.log_probs > full + 1e-2).any()


def test_a_rollout_depends_on_its_seed_and_not_on_its_company(served: Served) -> None:
    together = served.sample(requests(8))
    alone = [served.sample([request])[0] for request in requests(8)]
    reseeded = served.sample(requests(8, seed=1))
    assert [rollout.tokens.tolist() for rollout in together] == [
        rollout.tokens.tolist() for rollout in alone
    ]
    assert together[0].tokens.tolist() != together[1].tokens.tolist()  # same context
    assert together[0].tokens.tolist() != reseeded[0].tokens.tolist()


def test_more_prompt_tokens_than_one_engine_step_takes_are_all_sampled(served: Served) -> None:
    """64 different contexts of 200 tokens: a prompt cut in two once killed the engine."""
    rng = np.random.default_rng(0)
    wanted = [
        replace(request, context=rng.integers(0, 256, 200).astype(np.int32))
        for request in requests(64, max_tokens=3)
    ]
    rollouts = served.sample(wanted)
    assert len(rollouts) == 64
    assert largest_gap(policy(served.model, seed=0), rollouts[::16]) < 1e-4


def test_guidance_comes_first_counts_and_is_not_the_policy_s(served: Served) -> None:
    rollouts = served.sample(requests(4, guidance=(65, 66, 67), max_tokens=10))
    for rollout in rollouts:
        assert rollout.tokens[:3].tolist() == [65, 66, 67]
        assert rollout.origins.tolist() == [Origin.GUIDANCE] * 3 + [Origin.POLICY] * (
            rollout.num_tokens - 3
        )
        assert rollout.versions[:3].tolist() == [-1] * 3
        assert rollout.num_tokens <= 10
    assert largest_gap(policy(served.model, seed=0), rollouts) < 1e-4


def test_a_completion_ends_with_the_end_token_or_with_its_budget(served: Served) -> None:
    rollouts = served.sample(requests(40, max_tokens=60))
    assert {rollout.finish_reason for rollout in rollouts} == set(FinishReason)
    for rollout in rollouts:
        ended = rollout.tokens[-1] == EOS_ID
        assert ended == (rollout.finish_reason is FinishReason.STOP)
        assert ended or rollout.num_tokens == 60
        assert rollout.token_ends[-1] == len(rollout.text)


def test_loaded_weights_are_the_policy_from_then_on(served: Served) -> None:
    other = policy(served.model, seed=1)
    report = asyncio.run(served.worker.load_weights(bundle(other, 7)))
    rollouts = served.sample(requests(8))  # contexts that the prefix cache has seen before
    assert report.version == 7
    assert set(report.timings_s) == {"transfer", "pause", "load", "resume"}
    assert largest_gap(other, rollouts) < 1e-4
    assert {int(version) for rollout in rollouts for version in rollout.versions} == {7}


def test_weights_arrive_through_a_file_where_vllm_s_workers_are_other_processes(
    served: Served,
) -> None:
    from rollout_workers.vllm_engine import VllmEngine, _write_image  # reads the environment

    engine, other = served.worker._started(), policy(served.model, seed=2)
    assert isinstance(engine, VllmEngine)
    sent = bundle(other, 9)
    file = _write_image(sent)
    received = engine._loop.call(lambda batch: batch.receive(file, sent)).result()
    file.unlink()
    assert received == [sent.checksum]
    engine._loop.call(lambda batch: batch.set_version(9)).result()
    assert largest_gap(other, served.sample(requests(8))) < 1e-4


def test_every_token_carries_the_weights_that_sampled_it_across_swaps(served: Served) -> None:
    policies = [policy(served.model, seed=seed) for seed in range(3)]

    async def main() -> list[Rollout]:
        bundles = [bundle(policy, 0) for policy in policies]
        running = asyncio.create_task(served.worker.sample(requests(8, max_tokens=200)))
        for version in itertools.count(1):  # as often as the engine takes them
            await served.worker.load_weights(replace(bundles[version % 3], version=version))
            if running.done():
                break
        return await running

    rollouts = asyncio.run(main())
    assert max(len(set(rollout.versions.tolist())) for rollout in rollouts) > 2
    for rollout in rollouts:
        assert (np.diff(rollout.versions) >= 0).all()
        gaps = [np.abs(expected_log_probs(p, rollout) - rollout.log_probs) for p in policies]
        assert np.choose(rollout.versions % 3, gaps).max() < 1e-4


def test_damaged_weights_are_refused_and_the_old_ones_stay(served: Served) -> None:
    damaged = bundle(policy(served.model, seed=1), 5)
    damaged = replace(damaged, checksum=damaged.checksum ^ 1)
    with pytest.raises(WeightMismatch, match="xxh3"):
        asyncio.run(served.worker.load_weights(damaged))
    rollouts = served.sample(requests(4))
    assert largest_gap(policy(served.model, seed=0), rollouts) < 1e-4
    assert rollouts[0].versions[0] == 0


def test_requests_that_no_engine_would_take_are_bad_input(served: Served) -> None:
    with pytest.raises(PromptTooLong, match="needs 505 tokens"):
        served.sample(requests(2, max_tokens=500))
    with pytest.raises(BadInput, match="top_p"):
        served.sample(requests(2, top_p=2.0))
    assert len(served.sample(requests(2))) == 2  # and the engine goes on


def test_a_cancelled_call_leaves_the_engine_to_the_others(served: Served) -> None:
    async def main() -> None:
        given_up = asyncio.create_task(served.worker.sample(requests(4, max_tokens=200)))
        wanted = asyncio.create_task(served.worker.sample(requests(4, seed=1)))
        await served.worker.load_weights(bundle(policy(served.model, seed=0), 1))
        given_up.cancel()
        assert len(await wanted) == 4

    asyncio.run(main())


def test_a_vllm_that_was_not_checked_is_refused() -> None:
    check_version("0.26.0")
    check_version("0.32.1+cpu")
    for version in ("0.25.9", "0.33.0", "1.0"):
        with pytest.raises(UserError, match=r"0\.26 to 0\.32"):
            check_version(version)


def test_a_vllm_of_another_version_is_refused_before_its_engine_is_imported(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.25.1")
    monkeypatch.delitem(sys.modules, "rollout_workers.vllm_engine")
    with pytest.raises(UserError, match=r"vLLM 0\.25\.1 is installed"):
        asyncio.run(RolloutWorker(served.model, CONFIG, MAX_MODEL_LEN).start())
    assert "rollout_workers.vllm_engine" not in sys.modules


def test_a_vllm_without_a_part_of_the_transfer_api_is_refused_by_its_name(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_interfaces()
    worker = sys.modules["vllm.v1.worker.gpu_worker"].Worker
    monkeypatch.delattr(worker, "finish_weight_update")
    with pytest.raises(UserError, match=r"gpu_worker\.Worker\.finish_weight_update, which"):
        check_interfaces()
