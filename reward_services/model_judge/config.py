"""Settings of a step judge that is a model: which one, where it runs and what it is asked.

Light on purpose: importing it loads neither a model nor a client.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from grpo.config import Schema
from grpo.types import DType

Reference = Literal["solution", "answer", "withheld"]

FIELDS = ("problem", "reference", "steps", "answer", "num_steps")
FIELD = re.compile(r"\{([a-z_]+)\}")  # other braces, as those of JSON, are text

_TASK = """You check the steps of a student's solution, one after the other.

Problem:
{problem}

"""
_COMPARED = """Reference solution:
{reference}

"""
_ASKED = """The student's steps:
{steps}

Find the first wrong step. A step is wrong if it is not mathematically valid, given the problem and
the steps before it. Another way than the reference's is fine, and so are brevity, repetition and
unusual formatting. Reply with JSON only: {"first_wrong_step": k} with k from 1 to {num_steps}, or
{"first_wrong_step": null} if no step is wrong."""

DEFAULT_PROMPT = _TASK + _COMPARED + _ASKED
DEFAULT_PROMPT_WITHHELD = _TASK + _ASKED


class LocalModelConfig(Schema):
    """A causal language model that the scorer's own process runs."""

    path: str = Field(description="its folder or its name on the Hugging Face hub")
    engine: Literal["vllm", "transformers"] = Field(
        "vllm", description="transformers is for machines without vLLM and for comparison"
    )
    dtype: DType = Field("float32", description="of the weights")
    max_model_len: int = Field(4096, ge=1, description="tokens of a question and its reply")
    max_concurrent: int = Field(64, ge=1, description="questions in the engine at a time")
    threads: int = Field(1, ge=1, description="of one engine on the CPU")
    kv_cache_gib: float = Field(0.25, gt=0, description="vLLM on the CPU: its KV cache")
    gpu_memory_utilization: float = Field(
        0.4, gt=0, lt=1, description="vLLM on a GPU: its share of the memory, KV cache included"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="vLLM: GPUs that share the weights")
    start_deadline_s: float = Field(600.0, gt=0, description="for loading the model")


class EndpointConfig(Schema):
    """A server that speaks OpenAI's chat protocol with structured output."""

    url: str = Field(pattern=r"^https?://", description="its base, such as http://judge:8000/v1")
    model: str = Field(description="as the server calls it")
    api_key_env: str | None = Field(
        None, description="the environment variable that holds the key; null: none is needed"
    )
    concurrency: int = Field(16, ge=1, description="questions under way at a time, of each actor")
    request_timeout_s: float = Field(30.0, gt=0, description="for one try of one question")
    request_retries: int = Field(
        2, ge=0, description="further tries after a lost connection, a timeout or an overload"
    )
    extra: dict[str, JsonValue] = Field(
        {}, description="further fields of each request, such as temperature or reasoning_effort"
    )


class Turn(Schema):
    """One message of a question that is a conversation."""

    role: Literal["user", "assistant"] = Field(description="who says it")
    content: str = Field(description="with the same fields as a prompt that is one text")


Template = str | tuple[Turn, ...]  # a text is one message of the user


def turns_of(template: Template) -> tuple[Turn, ...]:
    """The messages of a prompt, whichever way it is written."""
    return (Turn(role="user", content=template),) if isinstance(template, str) else template


class ModelJudgeConfig(Schema):
    """A model that reads numbered steps and names the first wrong one (SGPO, arXiv:2505.11595)."""

    model: LocalModelConfig | None = Field(None, description="run a model of our own")
    endpoint: EndpointConfig | None = Field(None, description="ask an OpenAI-compatible server")
    reference: Reference = Field(
        "solution",
        description="what the judge may compare with: the data set's solution, its final answer, "
        "or nothing (withheld)",
    )
    solution_column: str = Field("solution", description="the data set's column with the solution")
    system: str | None = Field(None, description="the system message; null: none")
    prompt: Template | None = Field(
        None,
        description="the question, with the fields {problem}, {reference}, {steps} (numbered from "
        "1), {answer} (the steps as they stand) and {num_steps}: a text, or a list of messages "
        "{role, content}; null: that of a model from covey judge train, else a general one",
    )
    max_reply_tokens: int = Field(
        64, ge=1, description="more are cut off; a server's model that reasons needs room for it"
    )

    @field_validator("prompt")
    @classmethod
    def _has_known_fields(cls, value: Template | None) -> Template | None:
        if value is None:
            return None
        found = _fields(value)
        if unknown := found - set(FIELDS):
            raise ValueError(
                f"found the field {{{min(unknown)}}}; expected {{problem}}, {{reference}}, "
                "{steps}, {answer} or {num_steps}"
            )
        if "problem" not in found or not found & {"steps", "answer"}:
            raise ValueError("a judge has to be told the {problem} and the {steps} or {answer}")
        if turns_of(value)[-1].role != "user":
            raise ValueError("the last message is the assistant's, and the judge is to reply to it")
        return value

    @model_validator(mode="after")
    def _has_one_backend(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            count = "none" if self.model is None else "both"
            raise ValueError(
                f"found {count} of model and endpoint; expected one, for example model: "
                "{path: models/judge}"
            )
        return self

    @model_validator(mode="after")
    def _prompt_fits_the_reference(self) -> Self:
        if self.prompt is None:
            return self
        is_asked = "reference" in _fields(self.prompt)
        if is_asked == (self.reference == "withheld"):
            raise ValueError(
                f"reference is {self.reference}, but the prompt has "
                f"{'a' if is_asked else 'no'} field {{reference}}: change one of the two"
            )
        return self


def _fields(template: Template) -> set[str]:
    return {field for turn in turns_of(template) for field in FIELD.findall(turn.content)}
