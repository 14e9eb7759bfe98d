"""Building a batch against training on it: what share of a step is spent on rewards and weights?

    python -m benchmarks.batch_building              64 groups x 16 rollouts x 1,024 tokens
    python -m benchmarks.batch_building --groups 8   a shorter run; the share hardly moves

Groups are made here: rollouts of a group share a random beginning, as real ones do. `select`,
`build_batch` and the learner's step are those of a run; the learner is the plain torch one with a
random Qwen2-shaped model of 0.3 million parameters, which is as small as models get here, so that
the share is an upper bound. The second table doubles the tokens: linear cost doubles.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from grpo.algorithms import ALGORITHMS
from grpo.batch import build_batch
from grpo.pipeline import Pipeline
from grpo.types import (
    Dropped,
    FinishReason,
    Group,
    Origin,
    Prompt,
    Rollout,
    Score,
    Span,
    TrainBatch,
)
from learner.config import LearnerConfig
from learner.rank import LearnerRank

VOCABULARY, CONTEXT = 512, 32
ROLLOUTS, TOKENS, REPEATS = 16, 1024, 5
# name, settings, how many times more rollouts are sampled than trained
CASES = (
    ("grpo", {}, 1),
    ("lambda_grpo_prm", {}, 1),
    ("pods", {"num_kept": ROLLOUTS}, 4),
    ("gdpo", {}, 1),
    ("reinforce_pp", {}, 1),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the share of each algorithm's batch building, and how it grows with the tokens."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_building")
    parser.add_argument("--groups", type=int, default=64)
    options = parser.parse_args(arguments)
    pipelines = {name: (_pipeline(name, settings, more), more) for name, settings, more in CASES}
    grpo = _built(pipelines["grpo"][0], _groups(options.groups, ROLLOUTS, TOKENS))
    learner_s = _learner_seconds(grpo)
    print(f"{options.groups} groups x {ROLLOUTS} rollouts x {TOKENS} tokens")
    print(f"learner's step, torch, 0.3 M parameters, float32: {learner_s:.1f} s")
    print(
        f"{'algorithm':<18}{'build (median of ' + str(REPEATS) + ')':>24}{'share of the step':>20}"
    )
    for name, (pipeline, more) in pipelines.items():
        seconds = _build_seconds(pipeline, _groups(options.groups, more * ROLLOUTS, TOKENS))
        print(f"{name:<18}{seconds:>22.3f} s{seconds / (seconds + learner_s):>19.2%}")
    print(f"\n{'algorithm':<18}" + "".join(f"{n:>12} tokens" for n in (256, 512, 1024, 2048)))
    for name, (pipeline, more) in pipelines.items():
        per_token = [
            _build_seconds(pipeline, _groups(8, more * ROLLOUTS, n)) / (8 * ROLLOUTS * n)
            for n in (256, 512, 1024, 2048)
        ]
        print(f"{name:<18}" + "".join(f"{1e9 * value:>10.0f} ns/token" for value in per_token))


def _pipeline(name: str, settings: dict[str, object], more: int) -> Pipeline:
    algorithm = ALGORITHMS[name]
    config = algorithm.config.model_validate({"num_generations": more * ROLLOUTS, **settings})
    return algorithm.pipeline(config, outcomes={"answer": 1.0}, max_completion_length=TOKENS)


def _groups(count: int, rollouts: int, tokens: int) -> list[Group]:
    rng = np.random.default_rng(0)
    return [_group(rng, number, rollouts, tokens) for number in range(count)]


def _group(rng: np.random.Generator, number: int, rollouts: int, tokens: int) -> Group:
    """Each rollout leaves the first one at a random place in the first quarter."""
    stem = rng.integers(2, VOCABULARY, tokens)
    prompt = Prompt(
        id=str(number), text="", tokens=rng.integers(2, VOCABULARY, CONTEXT).astype(np.int32)
    )
    made = []
    for index in range(rollouts):
        own = rng.integers(2, VOCABULARY, tokens)
        shared = int(rng.integers(0, tokens // 4))
        own[:shared] = stem[:shared]
        made.append(_rollout(index, prompt, own.astype(np.int32), rng))
    scores = tuple(
        Score(
            scorer="answer",
            span=Span(rollout=index, start=0, end=tokens),
            value=float(rng.integers(0, 2)),
        )
        for index in range(rollouts)
    )
    return Group(id=number, prompt=prompt, rollouts=tuple(made), scores=scores)


def _rollout(index: int, prompt: Prompt, tokens: np.ndarray, rng: np.random.Generator) -> Rollout:
    count = len(tokens)
    return Rollout(
        index=index,
        context=prompt.tokens,
        tokens=tokens,
        log_probs=-rng.random(count).astype(np.float32),
        origins=np.full(count, Origin.POLICY, np.uint8),
        versions=np.zeros(count, np.int32),
        text="x" * count,
        token_ends=np.arange(1, count + 1, dtype=np.int32),
        finish_reason=FinishReason.STOP,
    )


def _built(pipeline: Pipeline, groups: Sequence[Group]) -> TrainBatch:
    """What a run does between the last score and the learner."""
    kept: list[Group] = []
    for group in groups:
        outcome: Group | Dropped = group
        for select in pipeline.select:
            outcome = select(group, pipeline.initial_state)
            if isinstance(outcome, Dropped):
                break
            group = outcome
        if isinstance(outcome, Group):
            kept.append(group)
    state = pipeline.initial_state
    return build_batch(pipeline, kept, state, step=1, version=0, num_updates=1).batch


def _build_seconds(pipeline: Pipeline, groups: Sequence[Group]) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        _built(pipeline, groups)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _learner_seconds(batch: TrainBatch) -> float:
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
            )
        )
        model.save_pretrained(Path(folder))
        learner = LearnerRank(
            model=folder,
            config=LearnerConfig(backend="torch", cpus_per_rank=2, learning_rate=1e-6),
            algorithm={"name": "grpo"},
            total_steps=2,
            temperature=1.0,
            rank=0,
            world_size=1,
            master="127.0.0.1:0",
            seed=0,
        )
        learner.start()
        started = time.perf_counter()
        learner.train(batch)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
