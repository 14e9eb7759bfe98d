"""Where Ray puts roles that ask for parts of GPUs; it takes our word that there are any."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import ray

from orchestration.cluster import device_of, located

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Role:
    """Does nothing, where it was put."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, num_gpus=3, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_every_rank_has_a_gpu_of_its_own_and_every_worker_shares_one_with_a_rank() -> None:
    """Ranks first, as in a run whose roles share GPUs."""

    async def main() -> tuple[list[str], list[str]]:
        found = []
        for gpus in (0.6, 0.4):
            actors = [ray.remote(Role).options(num_cpus=1, num_gpus=gpus).remote() for _ in "abc"]
            kept.extend(actors)
            await asyncio.gather(*[located(actor) for actor in actors])
            found.append([await device_of(actor) for actor in actors])
        return found[0], found[1]

    kept: list[object] = []
    ranks, workers = asyncio.run(main())
    assert len(set(ranks)) == 3
    assert sorted(workers) == sorted(ranks)
