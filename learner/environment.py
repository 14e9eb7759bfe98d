"""The environment variables of a learner rank, to be set before its process imports torch.

Pure and light: neither torch nor DeepSpeed is imported, nothing is set here.
"""

from __future__ import annotations

from collections.abc import Mapping

from learner.config import LearnerConfig


def rank_environment(
    config: LearnerConfig, *, rank: int, world_size: int, master: str, visible_devices: str | None
) -> dict[str, str]:
    """What torch.distributed, DeepSpeed and OpenMP read. `master` is "host:port" of rank 0.

    `visible_devices` is CUDA_VISIBLE_DEVICES, None where it is not set. Ray shows each actor its
    own device only, so that the local rank is 0 there; with all devices of a machine in sight it
    is the place of the rank among them.
    """
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f'master is "{master}", expected "host:port" of rank 0')
    num_visible = len(visible_devices.split(",")) if visible_devices else world_size
    sharing = num_visible if config.gpus_per_rank else world_size
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % sharing),
        "LOCAL_SIZE": str(sharing),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cuda" if config.gpus_per_rank else "cpu",
        **thread_environment(config.cpus_per_rank),
    }


def thread_environment(num_threads: int) -> Mapping[str, str]:
    """OpenMP threads that sleep while they wait: spinning ones starve the other processes."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "KMP_BLOCKTIME": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
