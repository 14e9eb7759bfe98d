"""Which adapters a rollout engine can take, as far as its settings tell.

Light: importing it loads neither torch nor vLLM. Refuses to know the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from grpo.errors import WeightMismatch
from grpo.types import AdapterShape, WeightBundle
from rollout_workers.config import RolloutConfig

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM makes room for one of these
INSTEAD = "or set learner.lora.publish: merged"


def vllm_rank(rank: int) -> int:
    """The smallest that has room: 12 gives 16. A and B are padded with zeros."""
    return next(room for room in VLLM_RANKS if room >= rank)


def adapter_problems(config: RolloutConfig, adapters: AdapterShape) -> Iterator[str]:
    """What the engine cannot do with them, and the remedy."""
    if config.engine != "vllm":
        return
    if adapters.rank > VLLM_RANKS[-1]:
        yield (
            f"learner.lora.rank is {adapters.rank}, but vLLM applies adapters of rank "
            f"{VLLM_RANKS[-1]} at most: lower it, {INSTEAD}"
        )
    if config.gpus_per_worker > 0 and config.dtype == "float32":
        yield (
            "rollout.dtype is float32, but vLLM's adapter kernels on GPUs take bfloat16 only: set "
            f"rollout.dtype: bfloat16, {INSTEAD}"
        )


def refuse_other_kind(bundle: WeightBundle, adapters: AdapterShape | None) -> None:
    """An engine takes adapters of the shape that it was started for, or whole weights: never both.

    Weights with merged adapters under a set of adapters would count them twice.
    """
    if bundle.adapters != adapters:
        raise WeightMismatch(
            f"weights of version {bundle.version} hold {_kind(bundle.adapters)}, but the engine "
            f"was started for {_kind(adapters)}; they were not used"
        )


def _kind(adapters: AdapterShape | None) -> str:
    return "all weights of the model" if adapters is None else f"adapters ({adapters})"
