"""Evaluates a model that lies on disk, in this process: no cluster, no learner.

Prompts and completions share the positions that the model has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.errors import UserError
from grpo.types import Prompt, Sampling
from orchestration.check_model import model_facts, num_positions
from orchestration.checkpoint import latest_checkpoint
from orchestration.config import DataConfig
from orchestration.evaluation import EvalReport, evaluate
from orchestration.local import LocalRolloutWorker
from orchestration.prompts import load_prompts
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from rollout_workers.config import RolloutConfig
from rollout_workers.tokenization import Tokenization
from rollout_workers.worker import RolloutWorker

CONCURRENT_PROMPTS = 64  # more than any small engine runs at a time


def evaluate_model(
    model: Path,
    data: str,
    *,
    rollout: RolloutConfig,
    scorer: ScorerConfig,
    split: str,
    samples: int,
    num_prompts: int | None,
    max_prompt_length: int,
    max_completion_length: int,
    temperature: float,
    seed: int,
    on_phase: Callable[[str], None],
) -> EvalReport:
    """Load the model, complete and score every prompt; UserError for what cannot be found."""
    folder = model_folder(model, on_phase)
    model_facts(folder, 1)
    positions = num_positions(folder)
    if positions is not None and max_prompt_length + max_completion_length > positions:
        max_prompt_length = min(max_prompt_length, positions // 2)
        max_completion_length = min(max_completion_length, positions - max_prompt_length)
        on_phase(
            f"{positions} positions: at most {max_prompt_length} tokens of prompt and "
            f"{max_completion_length} of completion"
        )
    (source,) = DataConfig.model_validate({"train": data, "split": split}).training_sources
    prompts = load_prompts(
        source,
        Tokenization(folder),
        max_prompt_length=max_prompt_length,
    ).prompts
    sampling = Sampling(
        temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_completion_length
    )
    worker = RolloutWorker(folder, rollout, max_prompt_length + max_completion_length)
    on_phase(f"starting {rollout.engine}")
    service = ScorerService(scorer)
    return asyncio.run(
        _evaluated(worker, service, prompts[:num_prompts], sampling, samples=samples, seed=seed)
    )


def model_folder(model: Path, remark: Callable[[str], None]) -> str:
    """The folder that transformers can load: of a model, a checkpoint or a run; else a hub id."""
    if not model.is_dir():
        return str(model)
    latest = latest_checkpoint(model, remark)
    for folder in (model, model / "huggingface", *([latest / "huggingface"] if latest else [])):
        if (folder / "config.json").is_file():
            return str(folder.resolve())
    raise UserError(
        f"{model} is no model: it holds neither config.json nor a checkpoint with a huggingface/ "
        "export"
    )


async def _evaluated(
    worker: RolloutWorker,
    scorer: ScorerService,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
) -> EvalReport:
    try:
        await scorer.start()
        await worker.start()
        return await evaluate(
            LocalRolloutWorker(worker),
            scorer,
            prompts,
            samples=samples,
            sampling=sampling,
            seed=seed,
            first_group=0,
            concurrency=CONCURRENT_PROMPTS,
        )
    finally:
        await worker.close()
        await scorer.close()
