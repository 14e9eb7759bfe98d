"""Environment variables that must be set before a rollout worker's process imports torch.

Knows no vLLM, so that the driver can ask for them without importing it.
"""

from __future__ import annotations

from pathlib import Path

from rollout_workers.config import RolloutConfig


def engine_environment(config: RolloutConfig, model: str) -> dict[str, str]:
    """What the process of one rollout worker needs in its environment."""
    variables = {
        "OMP_NUM_THREADS": str(config.cpus_per_worker),
        # Threads that spin while they wait starve the other actors of the machine (10x slower).
        "KMP_BLOCKTIME": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if config.engine == "vllm":
        variables |= _vllm_environment(config)
    return variables


def _vllm_environment(config: RolloutConfig) -> dict[str, str]:
    variables = {
        # The engine loop runs in a thread of the worker itself; see vllm_engine.py.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins itself to all cores
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if config.eager and config.gpus_per_worker == 0:
        # vLLM compiles one small log-prob kernel even in eager mode: 3 to 8 s at the first token.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
