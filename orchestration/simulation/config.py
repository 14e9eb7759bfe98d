"""Service times of a simulated run. Light: importing it loads neither numpy nor torch."""

from __future__ import annotations

from pydantic import Field

from grpo.config import Schema


class SimulationConfig(Schema):
    """How long each part takes in `covey simulate`; a real run reads none of it."""

    worker_tokens_per_s: float = Field(
        5000.0, gt=0, description="of one rollout worker whose places are all taken"
    )
    worker_rollouts: int | None = Field(
        None,
        ge=1,
        description="places: rollouts that a worker generates at a time, each at "
        "worker_tokens_per_s / worker_rollouts; null: rollout.max_concurrent_rollouts",
    )
    mean_tokens: float | None = Field(
        None,
        gt=0,
        description="mean length of a completion, before the token budget cuts the longest; null: "
        "half of sampling.max_completion_length",
    )
    spread: float = Field(
        0.8,
        ge=0,
        description="standard deviation of the logarithm of the lengths: 0.8 is a long tail, "
        "where one in 20 is above 2.7 times the mean; 0: all equal",
    )
    prompt_tokens: int | None = Field(
        None, ge=1, description="null: half of sampling.max_prompt_length"
    )
    scorer_s: float = Field(
        0.05, ge=0, description="one group at one scorer actor, which takes one at a time"
    )
    constant_share: float = Field(
        0.0, ge=0, le=1, description="share of groups whose rollouts are all scored alike"
    )
    learner_tokens_per_s: float = Field(
        20000.0, gt=0, description="of all ranks together; prompts and completions count"
    )
    publish_s: float = Field(
        0.5, ge=0, description="the learner hands its weights out; the engines go on"
    )
    load_s: float = Field(0.5, ge=0, description="an engine takes new weights; it pauses")
