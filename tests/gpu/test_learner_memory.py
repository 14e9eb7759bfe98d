"""What the learner holds on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.rank import LearnerRank
from tests.unit.learner_cases import batch_of, random_rows, rank_of, torch_config, write_model

pytestmark = pytest.mark.gpu


def held_bytes(learner: LearnerRank) -> int:
    """On the device between steps."""
    learner.train(batch_of(random_rows(8)))
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_a_reference_in_host_memory_leaves_the_device_between_its_passes(tmp_path: Path) -> None:
    model = write_model(tmp_path, hidden_size=1024)
    found, metrics = [], []
    for is_offloaded in (False, True):
        before = torch.cuda.memory_allocated()
        config = torch_config(gpus_per_rank=1, reference_offload=is_offloaded)
        learner = rank_of(model, config)
        weights = learner._pretrained.parameters()
        model_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        found.append(held_bytes(learner) - before)
        metrics.append(learner.train(batch_of(random_rows(8), step=1)).metrics["kl"])
        learner.close()
        del learner, weights
    assert found[1] < found[0] - 0.9 * model_bytes
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
