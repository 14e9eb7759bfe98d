"""Every member's halves together: two steps of a real model on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from grpo.algorithms import ALGORITHMS
from tests.unit.family_cases import halves, rows_of
from tests.unit.learner_cases import batch_of, rank_of, torch_config, write_model
from tests.unit.test_family_members import PLAIN, distinct_groups


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("family") / "model")


@pytest.mark.parametrize("name", PLAIN)
def test_every_member_trains_two_steps_on_the_cpu(name: str, model: str) -> None:
    settings = {"num_generations": 4, "beta": 0.01}
    pipeline, _ = halves(name, **settings)
    config = ALGORITHMS[name].config(**settings)
    algorithm = {"name": name, **config.model_dump(mode="json")}
    learner = rank_of(model, torch_config(), algorithm=algorithm)
    start = learner.log_probs(rows_of(pipeline, distinct_groups(0), pipeline.initial_state))
    for step in range(2):
        rows = rows_of(pipeline, distinct_groups(step), pipeline.initial_state)
        report = learner.train(batch_of(rows[: len(rows) // 2], rows[len(rows) // 2 :], step=step))
        assert np.isfinite(list(report.metrics.values())).all()
        assert report.metrics["grad_norm"] > 0
    end = learner.log_probs(rows_of(pipeline, distinct_groups(0), pipeline.initial_state))
    assert any(before != after for before, after in zip(start, end, strict=True))
    learner.close()
