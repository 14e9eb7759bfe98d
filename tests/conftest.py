"""What every test process needs before torch is loaded, and which tests are left out."""

from __future__ import annotations

import os

import pytest

# Threads that spin while they wait make tests on few cores ten times slower, and one thread a
# process keeps sums in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes too long, skip what cannot run here."""
    _deselect_chaos(config, items)
    _skip_gpu(items)


def _deselect_chaos(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests marked chaos run only where -m names them."""
    if "chaos" in config.option.markexpr:
        return
    marked = [item for item in items if item.get_closest_marker("chaos")]
    if marked:
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


def _skip_gpu(items: list[pytest.Item]) -> None:
    """With the reason, where PyTorch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # two seconds that most runs of a few tests do not need

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device"))
