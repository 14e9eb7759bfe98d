"""Settings that every algorithm accepts; each algorithm's own settings extend this schema.

Light on purpose: importing it loads neither torch nor any engine.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Schema(BaseModel):
    """A frozen record that refuses unknown keys. A default lives here and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AlgorithmConfig(Schema):
    """What all members of the family share. Names follow TRL."""

    num_generations: int = Field(8, ge=1, description="G, rollouts per prompt")
    beta: float = Field(0.0, ge=0, description="coefficient of the KL penalty to the reference")
    kl_estimator: Literal["k2", "k3"] = Field(
        "k3",
        description="per-token estimate of KL(policy || reference); k1 is absent because as a "
        "loss its gradient has mean zero",
    )
    importance_cap: float | None = Field(
        2.0,
        gt=0,
        description="upper bound of the weight policy/behaviour that corrects stale or "
        "numerically different rollouts (truncated importance sampling); null: no correction",
    )
    entropy_coef: float = Field(0.0, ge=0, description="bonus for the entropy of the policy")
