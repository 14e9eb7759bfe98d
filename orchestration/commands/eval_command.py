"""`covey eval`: how good a model is on a data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from orchestration.commands.output import remark, say


def run(arguments: Sequence[str]) -> int:
    """Print a table, or with --json one record."""
    options = _parser().parse_args(arguments)

    # Loaded here, as `covey eval --help` must not wait for them.
    from pydantic import ValidationError
    from rich.console import Console

    from grpo.errors import UserError
    from orchestration.display import evaluation_table
    from orchestration.model_evaluation import evaluate_model
    from reward_services.config import ScorerConfig
    from rollout_workers.config import RolloutConfig

    name = options.function or options.rule
    judge = {"function": options.function} if options.function else {"rule": options.rule}
    try:
        rollout = RolloutConfig(engine=options.engine, gpus_per_worker=options.gpus)
        scorer = ScorerConfig.model_validate({"name": "answer", **judge})
    except ValidationError as error:
        raise UserError("\n".join(str(detail["msg"]) for detail in error.errors())) from error
    report = evaluate_model(
        options.model,
        options.data,
        rollout=rollout,
        scorer=scorer,
        split=options.split,
        samples=options.samples,
        num_prompts=options.prompts,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
        temperature=options.temperature,
        seed=options.seed,
        on_phase=remark,
    )
    if options.json:
        say(json.dumps(report.as_json(), indent=2))
        return 0
    Console().print(evaluation_table(f"{options.model} by {name}", report))
    for failure, count in report.failures.items():
        say(f"{count} completions without a score: {failure}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="covey eval", description="Measure a model.")
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a model folder, a checkpoint, a run folder, or a Hugging Face id",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help=".jsonl, .parquet or an id")
    parser.add_argument("--split", default="test", help="of a Hugging Face data set (test)")
    parser.add_argument("--samples", type=_count, default=4, help="completions per prompt (4)")
    parser.add_argument("--prompts", type=_count, default=None, help="only the first so many")
    parser.add_argument("--rule", choices=("numeric", "exact"), default="numeric")
    parser.add_argument(
        "--function", metavar="FILE.PY:NAME", help="judge with this function instead of a rule"
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--gpus", type=int, default=0, help="for the engine (0: CPU)")
    parser.add_argument("--temperature", type=_temperature, default=1.0, help="0: greedy (1.0)")
    parser.add_argument("--max-prompt-length", type=_count, default=512, help="tokens (512)")
    parser.add_argument("--max-completion-length", type=_count, default=512, help="tokens (512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}; expected at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}; expected 0 (greedy) or more")
    return value
