"""Whether the output layer is compiled, and whether what compiles it is on this machine.

Light: loads neither torch nor Triton.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from grpo.errors import UserError
from learner.config import LearnerConfig


def fuses_log_probs(config: LearnerConfig) -> bool:
    """What learner.fused_log_probs means here; refused where it is true and cannot be."""
    missing = _missing_on_gpu() if config.gpus_per_rank else _missing_on_cpu()
    if config.fused_log_probs is None:
        return config.gpus_per_rank > 0 and missing is None
    if config.fused_log_probs and missing is not None:
        raise UserError(
            f"learner.fused_log_probs is true, but {missing}, or leave fused_log_probs out"
        )
    return config.fused_log_probs


def _missing_on_gpu() -> str | None:
    """What torch.compile lacks to make Triton, with the remedy; None: nothing."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton, as of the release of torch"
    # Triton compiles the start of each kernel in C.
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "there is no C compiler for Triton (gcc, or what CC names): install gcc"
    return None


def _missing_on_cpu() -> str | None:
    """What torch.compile lacks to make C++, with the remedy; None: nothing."""
    if shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        return f"there is no C++ compiler ({compiler}, or what CXX names): install g++"
    return None
