"""The vocabulary of covey: the records between driver, rollout workers, scorers and learner.

Knows nothing of Ray, vLLM, DeepSpeed or of any algorithm. Legend of shapes: T tokens of one
completion, L tokens of one context, G rollouts in a group, P groups in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


class Origin(IntEnum):
    """Who wrote a token of a completion."""

    POLICY = 0
    GUIDANCE = 1


class FinishReason(StrEnum):
    """Why a completion ended: the model stopped, or the token budget did it."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One row of a data set, tokenised once."""

    id: str
    text: str  # as the user wrote it, before the chat template
    tokens: Int32  # [L] with the chat template applied
    reference: str | None = None  # the right answer; None: the data set has none
    solution_tokens: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    domain: str = "default"
    columns: Mapping[str, object] = field(default_factory=dict)  # every column of the row
    stored: Group | None = None  # answers that exist already, of a data set of groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int  # 0: off
    max_tokens: int  # budget of one completion, guidance included


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The first `end` tokens of a rollout of the same group."""

    rollout: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutPlan:
    """What an algorithm asks for: one rollout of the group, in the algorithm's own terms.

    A completion begins with the prefix that it continues, then `guidance`, then `suffix`; the
    engine writes the rest. A prefix keeps its log-probs, versions and origins; guidance and suffix
    are given tokens.
    """

    guidance: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    # [len(guidance)]: some policy wrote it, with these log-probs, which makes the tokens POLICY
    # ones of unknown version. None: it is given, and GUIDANCE.
    guidance_log_probs: Float32 | None = None
    text: str | None = None  # a prompt instead of the data set's, before the chat template
    trains_on_prompt: bool = False  # sampled after `text`, trained after the data set's prompt
    continues: Prefix | None = None
    replaces: bool = False  # takes the place of the rollout that it continues
    suffix: str = ""  # text, tokenised as it stands
    # None: up to the budget of a completion. 0: what is given is all there is, nothing is sampled.
    max_new_tokens: int | None = None
    scores: tuple[Score, ...] = ()  # what was said of a given answer already

    def __post_init__(self) -> None:
        given, log_probs = self.guidance, self.guidance_log_probs
        if self.replaces and self.continues is None:
            raise ValueError("a plan replaces the rollout that it continues, but continues none")
        if self.text is not None and self.continues is not None:
            raise ValueError(
                "a plan with a text of its own cannot continue another prompt's tokens"
            )
        if self.trains_on_prompt and self.text is None:
            raise ValueError("trains_on_prompt is for a plan with a text of its own; it has none")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 0 or more")
        if log_probs is not None and len(log_probs) != len(given):
            raise ValueError(f"{len(given)} given tokens have {len(log_probs)} log-probs")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleRequest:
    """What a rollout worker is asked to generate: a plan made concrete."""

    group: int
    index: int  # place of the rollout in its group
    context: Int32  # [L]
    guidance: Int32  # first tokens of the completion, given and not sampled
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens of a completion up to `end` that were sampled together; `id` is theirs alone."""

    id: int  # within the group; selecting or numbering rollouts anew leaves it as it is
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One completion. Its [T] streams run in parallel and include an end-of-sequence token."""

    index: int  # its place in `Group.rollouts`; a selection of rollouts numbers them anew
    context: Int32  # [L] what the policy was conditioned on
    tokens: Int32  # [T]
    log_probs: Float32  # [T] under the policy that sampled it; 0 on guidance
    origins: NDArray[np.uint8]  # [T] of Origin
    versions: Int32  # [T] of the weights that sampled each token; -1 on guidance
    text: str  # tokens without special ones
    token_ends: Int32  # [T] end of each token in `text`, in characters
    finish_reason: FinishReason
    train_context: Int32 | None = None  # [L] what the learner conditions on; None: `context`
    # How it came to be, piece by piece; the last one ends at T. Two rollouts share tokens as long
    # as their pieces have the same ids. Empty: sampled at once, shared with nobody.
    lineage: tuple[Piece, ...] = ()
    # [T] each, by name: what the learner was asked about it before the batch is built.
    measured: Mapping[str, Float32] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason is FinishReason.LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens [start, end) of a rollout: an outcome [0, T), a prefix [0, t) or a step [s, t)."""

    rollout: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one scorer said of one span.

    value None and failure None: the scorer does not apply here. value None and a failure: it
    should have answered and could not. A failure is never a number.
    """

    scorer: str
    span: Span
    value: float | None
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """A prompt with its rollouts and what the scorers said of them."""

    id: int  # admission order, never used twice in a run
    prompt: Prompt
    rollouts: tuple[Rollout, ...] = ()
    scores: tuple[Score, ...] = ()

    def outcomes(self, scorer: str) -> list[float | None]:
        """The whole-answer score of each rollout; None where the scorer did not apply."""
        values: list[float | None] = [None] * len(self.rollouts)
        for score in self.scores:
            span = score.span
            whole = span.start == 0 and span.end == self.rollouts[span.rollout].num_tokens
            if score.scorer == scorer and whole:
                values[span.rollout] = score.value
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A group that will not be trained on, and why. Reasons are counted, details are logged."""

    group: int
    prompt: str
    reason: str  # few distinct values: "constant_outcome", "scorer_failed", ...
    detail: str = ""
    is_planned: bool = False  # skipped on purpose before anything was sampled: raises no alarm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainRow:
    """One rollout as the learner sees it: per-token streams, no algorithm by name."""

    group: int
    index: int
    context: Int32  # [L]
    tokens: Int32  # [T]
    weights: Float32  # [T] coefficient of each token's loss; the learner only sums
    advantages: Float32  # [T]
    policy_weights: Float32  # [T] multiplies the policy term but not the penalties
    behaviour_log_probs: Float32  # [T]
    versions: Int32  # [T]
    origins: NDArray[np.uint8]  # [T]
    reference_log_probs: Float32 | None = None  # [T] where they are known already
    # The tokens were sampled after another context than `context`: the ratio is taken to
    # `behaviour_log_probs`, and no importance weight applies.
    is_cross_context: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.context) + len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """The rows of one step, cut into optimiser updates; the coefficients of each sum up alone."""

    step: int
    version: int  # of the weights that the learner holds before the first update
    updates: tuple[tuple[TrainRow, ...], ...]
    is_stage: bool = False  # of `Objective.stage`; counts as no step of the learning rate
    learning_rate_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasureRequest:
    """What the learner is asked about whole groups before their batch is built."""

    names: tuple[str, ...]  # of `Objective.measures`
    groups: tuple[tuple[TrainRow, ...], ...]
    labels: tuple[Float64, ...]  # [G] for each group, as the algorithm labels its rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the learner measured in one step, under the names that metrics.jsonl uses."""

    metrics: Mapping[str, float]
    timings_s: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """Low-rank adapters beside a model's weights: y = W x + alpha / rank * B (A x)."""

    rank: int
    alpha: float
    target_modules: Literal["all-linear"] | tuple[str, ...]  # the ends of layer names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightBundle:
    """All weights of one version, as one safetensors image that any process can load."""

    version: int
    payload: NDArray[np.uint8]
    checksum: int  # xxh3_64 of the payload
    # Not None: the payload holds every A and B in float32, under peft's names; the weights beside
    # them are those of the model's files.
    adapters: AdapterShape | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightRef:
    """Where a published version can be fetched; the driver passes it on and never opens it."""

    version: int
    num_bytes: int
    checksum: int
    location: object  # a WeightBundle in one process, an object reference between actors


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A rollout engine has loaded a version; the checksum is of the bytes it received."""

    version: int
    checksum: int
    timings_s: Mapping[str, float]


DType = Literal["float32", "bfloat16"]
