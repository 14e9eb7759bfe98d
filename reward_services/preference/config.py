"""Settings of a preference model: where it lies, what it learns from and how.

Light on purpose: importing it loads nothing of the model.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from grpo.config import Schema
from grpo.types import DType


class RefreshConfig(Schema):
    """Lets the head learn further during a run; the paper's model stays as it is."""

    every_steps: int = Field(
        10, ge=1, description="steps from one refresh to the next; it learns from their groups"
    )
    outcome: str = Field(description="the scorer that says which answers are right")
    learn_deadline_s: float = Field(
        300.0, gt=0, description="for learning, and for writing or reading the head"
    )


class PreferenceConfig(Schema):
    """A preference model that `covey preference train` makes and a run asks about prefixes.

    Sizes of the head and of its training are our choices; the paper (arXiv:2602.17025) names the
    512 hidden units only.
    """

    folder: str = Field(description="holds its rollouts, weights and report; made by the training")
    encoder: str | None = Field(
        None,
        description="the frozen model whose states are read, with the policy's vocabulary; null: "
        "the model of the recipe that trained it",
    )
    num_questions: int = Field(2000, ge=2, description="training prompts that are answered")
    rollouts_per_question: int = Field(8, ge=2, description="answers to each of them (paper: K)")
    max_pairs_per_question: int = Field(
        16, ge=1, description="pairs of a right and a wrong answer to the same prompt, at most"
    )
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="share of the prompts that is measured on, not trained on"
    )
    largest_surprise: bool = Field(
        True,
        description="beside the mean state, tell the head the largest -log p of a token so far; "
        "false: mean states alone, which hardly see a single wrong step",
    )
    prefix_fractions: tuple[float, ...] = Field(
        (),
        description="also compare these equal fractions of the two answers of a pair, as in "
        "[0.25, 0.5, 0.75]; empty: whole answers only, as in the paper",
    )
    hidden_units: int = Field(512, ge=1, description="of the head")
    head_learning_rate: float = Field(1e-4, gt=0, description="Adam, constant")
    batch_size: int = Field(64, ge=1, description="pairs in a step")
    epochs: int = Field(3, ge=1, description="passes over all pairs")
    refresh: RefreshConfig | None = Field(
        None,
        description="train the head further on the outcomes of the run's own groups, with the "
        "settings above; null: the model stays as it was trained, as in the paper",
    )
    encoder_dtype: DType = Field("float32", description="of the frozen model that is read")

    @field_validator("prefix_fractions")
    @classmethod
    def _are_proper_fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < fraction < 1 for fraction in value):
            raise ValueError(f"found {list(value)}; expected numbers above 0 and below 1")
        return value
