"""Settings that every algorithm accepts; each algorithm's own settings extend this schema.

Light on purpose: importing it loads neither torch nor any engine.
"""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Schema(BaseModel):
    """A frozen record that refuses unknown keys. A default lives here and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_boolean(cls, value: object, info: ValidationInfo) -> object:
        """Python counts true as 1, so a rate of `true` would be one."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        # A union's types and the types of a Literal's values.
        parts = (annotation, *get_args(annotation))
        kinds = {part if isinstance(part, type) else type(part) for part in parts}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"found {str(value).lower()}; expected a number")
        return value


class AlgorithmConfig(Schema):
    """What all members of the family share. Names follow TRL."""

    num_generations: int = Field(8, ge=1, description="G, rollouts per prompt")
    beta: float = Field(0.0, ge=0, description="coefficient of the KL penalty to the reference")
    kl_estimator: Literal["k2", "k3", "k3_plus", "k3_unbiased"] = Field(
        "k3",
        description="per-token estimate of KL(policy || reference); k1 is absent because as a "
        "loss its gradient has mean zero: see kl_in_reward",
    )
    kl_in_reward: float = Field(
        0.0,
        ge=0,
        description="coefficient of k1, log policy - log reference, taken off the reward; needs "
        "the reference model. Beside it beta is a second KL term: set it to 0",
    )
    correction: Literal["tis", "mis"] = Field(
        "tis",
        description="tis: a weight above importance_cap becomes importance_cap; mis: a weight "
        "outside importance_floor..importance_cap becomes 0 (IcePop: 0.5 and 5)",
    )
    importance_cap: float | None = Field(
        2.0,
        gt=0,
        description="upper bound of the weight policy/behaviour that corrects stale or "
        "numerically different rollouts (truncated importance sampling); null: no correction",
    )
    importance_floor: float | None = Field(
        None, gt=0, description="lower bound of the weight with correction mis; null: none"
    )
    importance_level: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description="what is bounded: the weight of a token, the product over an answer, or (mis "
        "only) the geometric mean over an answer, which then only decides and weighs nothing",
    )
    off_policy_delta: float | None = Field(
        None,
        gt=0,
        description="do not train on an answer of negative advantage once its tokens are less "
        "likely than when sampled, by more than this mean log-ratio (0.5); null: off",
    )
    entropy_coef: float = Field(0.0, ge=0, description="bonus for the entropy of the policy")
    negative_scale: float = Field(
        1.0,
        ge=0,
        description="factor of negative advantages (arXiv:2404.14367); 0: only good answers teach",
    )
    reward_margin: float | None = Field(
        None,
        ge=0,
        description="drop groups whose best answer is not better than their worst by more than "
        "this, and sample others instead (arXiv:2404.14367); null: off",
    )

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the data that the settings name; an algorithm whose settings do says which."""
        return ()

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _is_a_loss(cls, value: object) -> object:
        if value in ("k1", "kl"):  # verl's two names
            raise ValueError(
                f"found {value!r}, log policy - log reference, whose gradient as a loss has mean "
                "zero and so pulls nowhere: set k2 (the gradient of the reverse KL) or k3, or put "
                "k1 into the reward with kl_in_reward, and beta: 0"
            )
        return value

    @model_validator(mode="after")
    def _bounds_belong_to_the_correction(self) -> Self:
        cap, floor = self.importance_cap, self.importance_floor
        if self.correction == "tis" and floor is not None:
            raise ValueError(
                f"importance_floor is {floor:g}, but correction tis only bounds from above: "
                "set correction: mis, or leave importance_floor null"
            )
        if self.correction == "tis" and self.importance_level == "geometric":
            raise ValueError(
                "importance_level is geometric, but a mean that is bounded weighs nothing: "
                "set correction: mis, or importance_level: sequence"
            )
        if self.correction == "mis" and cap is None:
            raise ValueError(
                "correction is mis, but importance_cap null switches it off: give it a bound"
            )
        if cap is not None and floor is not None and floor >= cap:
            raise ValueError(
                f"importance_floor is {floor:g}, but it must lie below importance_cap = {cap:g}"
            )
        return self
