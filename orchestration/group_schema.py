"""The JSON form of finished groups: what `covey explain` reads and `covey schema group` prints.

Knows shapes and defaults. Refuses to know files (`group_file.py`) and algorithms.
Shapes: T tokens of a rollout, G rollouts in a group, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from grpo.config import Schema

LOG_PROB_BOUNDS = (-1e5, 1e-3)
PerToken = float | tuple[float, ...]  # one number for all tokens, or one per token
# Null: the stream does not apply to the token.
Measured = float | tuple[float | None, ...] | None


class PromptInput(Schema):
    """What the rollouts answer."""

    id: str = Field("prompt", description="as the data set calls it")
    text: str = Field("", description="as the user wrote it")
    tokens: tuple[int, ...] = Field((0,), description="ids, chat template included")
    reference: str | None = Field(None, description="the right answer")
    solution_tokens: tuple[int, ...] = Field((), description="a worked solution, for guidance")
    domain: str = Field("default", description="kind of prompt")
    columns: dict[str, JsonValue] = Field({}, description="every column of the data set's row")


class PieceInput(Schema):
    """Tokens up to `end` that were sampled together."""

    id: int = Field(description="rollouts share tokens as long as their pieces have equal ids")
    end: int = Field(ge=0)


class RolloutInput(Schema):
    """One completion. Lists have one entry per token; one number stands for all tokens."""

    tokens: tuple[int, ...] | None = Field(
        None, description="ids; absent: equal strings of token_texts get equal ids"
    )
    token_texts: tuple[str, ...] | None = Field(
        None, description="the tokens as strings; absent: as `text` and token_ends cut it"
    )
    text: str | None = Field(None, description="absent: token_texts joined")
    token_ends: tuple[int, ...] | None = Field(
        None, description="where each token ends in `text`, in characters; absent: by token_texts"
    )
    log_probs: PerToken | None = Field(
        None,
        description="under the policy that sampled, as the rollout engine reported them; absent: "
        "the proximal ones, else the current ones, else 0. Of no meaning on guidance",
    )
    proximal_log_probs: PerToken | None = Field(
        None, description="under the policy at the start of the step; absent: log_probs"
    )
    current_log_probs: PerToken | None = Field(
        None, description="under the policy in this update; absent: the proximal ones"
    )
    reference_log_probs: PerToken | None = Field(
        None, description="under the reference; absent: the proximal ones"
    )
    entropy: PerToken | None = Field(
        None, description="of the policy at each token; absent: an algorithm that asks is refused"
    )
    hidden: tuple[tuple[float, ...], ...] | None = Field(
        None, description="[T][H] what the output layer multiplies to predict each token"
    )
    measured: dict[str, Measured] = Field(
        {}, description="streams of the learner by name; absent ones are computed from the others"
    )
    origins: tuple[Literal["policy", "guidance"], ...] | None = Field(
        None, description="who wrote each token; absent: guidance first, as num_guidance_tokens"
    )
    num_guidance_tokens: int = Field(0, ge=0, description="tokens that were given; see origins")
    versions: int | tuple[int, ...] = Field(
        0, description="of the weights that sampled each token; -1 on guidance"
    )
    finish_reason: Literal["stop", "length"] = Field("stop", description="length: cut off")
    context: tuple[int, ...] | None = Field(
        None, description="ids that the policy saw; absent: the tokens of the prompt"
    )
    train_context: tuple[int, ...] | None = Field(
        None,
        description="ids that the learner conditions on, where they differ from the context: the "
        "rollout is then cross-context",
    )
    lineage: tuple[PieceInput, ...] = Field(
        (), description="how a rollout of a tree came to be; the last piece ends at T"
    )

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens if self.tokens is not None else self.token_texts or ())

    @model_validator(mode="after")
    def _streams_fit(self) -> Self:
        if self.tokens is None and self.token_texts is None:
            raise ValueError("found neither tokens nor token_texts; give one of them")
        size = self.num_tokens
        streams = {name: getattr(self, name) for name in _PER_TOKEN}
        streams |= {f"measured.{name}": values for name, values in self.measured.items()}
        for name, values in streams.items():
            if isinstance(values, tuple) and len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries, but there are {size} tokens")
        for name in (name for name in _PER_TOKEN if name.endswith("log_probs")):
            _refuse_what_is_no_log_prob(name, streams[name])
        if self.num_guidance_tokens > size:
            raise ValueError(f"num_guidance_tokens is {self.num_guidance_tokens} of {size} tokens")
        if self.lineage and self.lineage[-1].end != size:
            raise ValueError(
                f"the last piece of lineage ends at {self.lineage[-1].end}; expected {size}, the "
                "number of tokens"
            )
        return self


def _refuse_what_is_no_log_prob(name: str, values: PerToken | None) -> None:
    """Round-off above 0 is let through; exp() of what is far below 0 is 0 long before."""
    if values is None:
        return
    low, high = LOG_PROB_BOUNDS
    numbers = values if isinstance(values, tuple) else (values,)
    for place, value in enumerate(numbers):
        if not low <= value <= high:
            raise ValueError(
                f"{name}.{place} is {value:g}; expected the natural logarithm of a probability, "
                f"from {low:g} to 0"
            )


_PER_TOKEN = (
    "token_texts",
    "token_ends",
    "log_probs",
    "proximal_log_probs",
    "current_log_probs",
    "reference_log_probs",
    "entropy",
    "hidden",
    "origins",
    "versions",
)


class ScoreInput(Schema):
    """What one scorer said of tokens [start, end) of one rollout."""

    scorer: str
    rollout: int = Field(ge=0, description="its place in the group")
    start: int = Field(0, ge=0)
    end: int | None = Field(None, ge=0, description="absent: to the end of the rollout")
    value: float | None = Field(None, description="null: the scorer does not apply")
    failure: str | None = Field(None, description="why the scorer could not answer")


class GroupInput(Schema):
    """A prompt, its rollouts and what the scorers said of them."""

    id: int | None = Field(None, description="absent: the place in the file")
    prompt: PromptInput = PromptInput()
    rollouts: tuple[RolloutInput, ...] = Field(min_length=1)
    outcomes: dict[str, tuple[float | None, ...]] = Field(
        {}, description="by scorer, the score of each whole answer; null: does not apply"
    )
    scores: tuple[ScoreInput, ...] = Field(
        (), description="scores of prefixes [0, t), steps [s, t) and whole answers"
    )
    state: JsonValue = Field(
        None, description="the algorithm's state; groups of one file must agree"
    )

    @model_validator(mode="after")
    def _scores_fit(self) -> Self:
        size = len(self.rollouts)
        for scorer, values in self.outcomes.items():
            if len(values) != size:
                raise ValueError(
                    f"outcomes.{scorer} has {len(values)} values, but there are {size} rollouts"
                )
        for place, score in enumerate(self.scores):
            if score.rollout >= size:
                raise ValueError(
                    f"scores.{place} is of rollout {score.rollout}; there are {size}, from 0"
                )
            tokens = self.rollouts[score.rollout].num_tokens
            end = tokens if score.end is None else score.end
            if not 0 <= score.start <= end <= tokens:
                raise ValueError(
                    f"scores.{place} is of tokens [{score.start}, {end}); rollout "
                    f"{score.rollout} has {tokens}"
                )
            if score.value is not None and score.failure is not None:
                raise ValueError(f"scores.{place} has a value and a failure; keep one of them")
        return self


class BatchInput(Schema):
    """The groups of one step, and what is known of the step beside them."""

    groups: tuple[GroupInput, ...] = Field(min_length=1)
    state: JsonValue = Field(
        None, description="the algorithm's state at the start of the step; null: its first"
    )
    learnable: float | None = Field(
        None, description="the algorithm's learnable scalar; null: its first value"
    )
    weights: dict[str, float] = Field(
        {}, description="coefficient of each scorer in the reward; a scorer that is absent has 1"
    )
    max_completion_length: int = Field(512, ge=1, description="token budget of a completion")
    updates_per_step: int = Field(1, ge=1, description="optimiser updates that share the groups")
    step: int = Field(1, ge=1, description="number of the step")
    version: int = Field(0, ge=0, description="of the weights before the step")
    output_layer: tuple[tuple[float, ...], ...] | None = Field(
        None, description="[V][H] the policy's output layer, for measures of hidden states"
    )

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        ids = [place if g.id is None else g.id for place, g in enumerate(self.groups)]
        if len(set(ids)) < len(ids):
            raise ValueError(f"the ids of the groups are {ids}; they must differ")
        return self
