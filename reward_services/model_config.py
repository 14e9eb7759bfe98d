"""Settings of scorers that are models of their own: process rewards and implicit rewards.

Light on purpose: importing it loads nothing of the models.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from grpo.config import Schema
from grpo.types import DType

Device = Literal["auto", "cpu", "cuda"]
Activation = Literal["none", "sigmoid", "softmax"]


class ModelPlace(Schema):
    """How a model is held and how much it reads at a time."""

    dtype: DType = Field("float32", description="of the computation")
    device: Device = Field(
        "auto", description="auto: the GPU that the actor was given (gpus_per_actor), else the CPU"
    )
    max_tokens_per_pass: int = Field(
        8192, ge=1, description="padding included; bounds the memory of one forward pass"
    )


class ProcessRewardConfig(ModelPlace):
    """A reward model from Hugging Face that is read at the end of each span.

    A step scorer as TRL trains it (token classification), an outcome reward model, or an encoder
    with several regression heads, one scorer for each label (arXiv:2503.21819).
    """

    model: str = Field(description="its folder or its name on the Hugging Face hub")
    head: Literal["token_classification", "reward"] = Field(
        "token_classification",
        description="how it was saved: as ...ForTokenClassification, or as "
        "...ForSequenceClassification (reward)",
    )
    label: str | int | None = Field(
        None,
        description="which of its outputs is the score, by name or number; null: it has only one",
    )
    label_weights: dict[str, float] = Field(
        {}, description="instead of one label: the score is the sum of these labels, weighted"
    )
    activation: Activation | None = Field(
        None,
        description="from outputs to a score; null: softmax over two labels or more, sigmoid for "
        "multi-label classification and for one label per token, none for regression and rewards",
    )
    separator: str = Field(
        "",
        description="text that was put after each step in its training, read in place of the white "
        "space there; the score stands at its last token",
    )
    prompt: Literal["plain", "chat"] = Field(
        "plain", description="the question as it stands, or in the model's own chat template"
    )

    @model_validator(mode="after")
    def _has_one_choice_of_labels(self) -> Self:
        if self.label is not None and self.label_weights:
            raise ValueError(
                f"found label {self.label!r} and label_weights; a score is one label or a "
                "weighted sum of several: remove one of the two"
            )
        return self


class ImplicitRewardConfig(ModelPlace):
    """PRIME's implicit process reward (arXiv:2502.01456): a policy that learns from outcomes.

    q = log p(token) of the model minus that of its reference; the score of a span is the sum of q.
    """

    model: str = Field(description="start of the model, with the policy's vocabulary")
    reference: str | None = Field(None, description="the frozen reference; null: the start")
    outcome: str = Field(description="the scorer that says which answers are right, 0 to 1")
    beta: float = Field(
        0.05, gt=0, description="of the training: P(right) = sigmoid(beta * sum of q)"
    )
    learning_rate: float = Field(1e-6, gt=0, description="AdamW, constant, without decay")
    max_grad_norm: float = Field(10.0, gt=0, description="longer gradients are scaled down to it")
    rollouts_per_update: int | None = Field(
        None, ge=1, description="answers in one update; null: all of a step"
    )
    learn_deadline_s: float = Field(
        600.0, gt=0, description="for learning from one step, and for writing or reading the model"
    )
