"""From groups and spans to the parallel lists that a judge gets: texts, prompts, columns.

Knows the records of grpo.types; knows nothing of who judges, when, or how often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from grpo.types import Group, Rollout, Span
from reward_services.user_functions import Batch

Item = tuple[Group, Span]  # what one score is asked for


def span_text(rollout: Rollout, span: Span) -> str:
    """The characters of a span: an outcome's whole text, a prefix, or one step."""
    start, end = span_characters(rollout, span)
    return rollout.text[start:end]


def span_characters(rollout: Rollout, span: Span) -> tuple[int, int]:
    """Where the text of a span begins and ends in the rollout's text."""
    if span.start == 0 and span.end == rollout.num_tokens:
        return 0, len(rollout.text)
    start = int(rollout.token_ends[span.start - 1]) if span.start else 0
    return start, int(rollout.token_ends[span.end - 1]) if span.end else 0


def span_keys(group: Group, spans: Sequence[Span]) -> list[bytes]:
    """The same for spans that no judge can tell apart: prompt, text and tokens up to their end."""
    prompt = group.prompt
    asked = repr((prompt.id, prompt.text, prompt.reference)).encode()
    return [_span_key(asked, group.rollouts[span.rollout], span) for span in spans]


def _span_key(asked: bytes, rollout: Rollout, span: Span) -> bytes:
    start, end = span_characters(rollout, span)
    text = rollout.text[:end].encode(errors="surrogatepass")
    # Sizes first, so that no two lists of parts read alike.
    sizes = b"%d %d %d %d %d " % (len(asked), start, span.start, span.end, len(text))
    parts = (sizes, asked, text, rollout.tokens[: span.end].tobytes())
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def joined(items: Sequence[Item]) -> Batch:
    """The parallel lists that a user function gets."""
    groups = [group for group, _ in items]
    rollouts = [group.rollouts[span.rollout] for group, span in items]
    spans = [span for _, span in items]
    texts = [span_text(r, s) for r, s in zip(rollouts, spans, strict=True)]
    prompts = [_user_prompt(group) for group in groups]
    names = {name: None for group in groups for name in group.prompt.columns}  # in order
    return Batch(
        prompts=prompts,
        completions=[
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        tokens=np.concatenate(
            [r.tokens[s.start : s.end] for r, s in zip(rollouts, spans, strict=True)]
        ),
        num_tokens=[span.end - span.start for span in spans],
        prompt_texts=[group.prompt.text for group in groups],
        completion_texts=texts,
        references=[group.prompt.reference for group in groups],
        columns={
            name: [g.prompt.columns.get(name, None) for g in groups]
            for name in names
            if name not in ("prompt", "completion", "completion_ids")  # TRL passes these as lists
        },
    )


def _user_prompt(group: Group) -> object:
    columns = group.prompt.columns
    return columns.get("prompt", group.prompt.text)
