"""Rows of a data set that are whole groups: a prompt with answers that exist already.

They have the form that `covey schema group` prints. Refuses to know who trains on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import ValidationError

from grpo.types import Int32, Prompt
from orchestration.group_file import from_record, groups_of
from orchestration.group_schema import BatchInput, GroupInput, RolloutInput

MAX_PROBLEMS_SHOWN = 3  # of one row, which can have one per token


def is_stored_group(columns: Mapping[str, object]) -> bool:
    """Whether the row is a group: its prompt is an object, and it has rollouts."""
    return "rollouts" in columns and "prompt" in columns and isinstance(columns["prompt"], Mapping)


def stored_prompt(
    columns: Mapping[str, object], *, name: str, encode: Callable[[str], Int32]
) -> Prompt:
    """The prompt of a group with the group itself; ValueError says what the row lacks.

    A prompt without tokens gets those of its text; so does a line of a run's groups.jsonl.
    """
    try:
        group = GroupInput.model_validate(_of_a_run(columns) if "times" in columns else columns)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
        ]
        raise ValueError("; ".join(problems[:MAX_PROBLEMS_SHOWN])) from error
    for place, rollout in enumerate(group.rollouts):
        _require_own(rollout, place)
    given = columns["prompt"]
    # From the model's own fields one could not tell: reading a record may fill in zeros.
    has_tokens = isinstance(given, Mapping) and "tokens" in given
    if not has_tokens and not group.prompt.text.strip():
        raise ValueError("the prompt has neither text nor tokens; give one of them")
    (stored,) = groups_of(BatchInput(groups=(group,)))
    prompt = stored.prompt
    return Prompt(
        id=name,
        text=prompt.text,
        tokens=prompt.tokens if has_tokens else encode(prompt.text),
        reference=prompt.reference,
        solution_tokens=prompt.solution_tokens,
        domain=prompt.domain,
        columns={**prompt.columns, "prompt": prompt.text},
        stored=stored,
    )


def _require_own(rollout: RolloutInput, place: int) -> None:
    """Tokens that a policy wrote after the plain prompt, with their log-probs; else ValueError."""
    if rollout.tokens is None or rollout.log_probs is None:
        missing = "tokens" if rollout.tokens is None else "log_probs"
        raise ValueError(
            f"rollout {place} has no {missing}: training on stored answers needs their token ids "
            "and the log-probabilities with which they were sampled"
        )
    if rollout.num_guidance_tokens or "guidance" in (rollout.origins or ()):
        raise ValueError(
            f"rollout {place} has tokens that were given to the policy, and no log-probabilities "
            "for these: leave such rollouts out"
        )
    if rollout.context is not None or rollout.train_context is not None:
        raise ValueError(
            f"rollout {place} answers another prompt than its group's: leave such rollouts out"
        )


def _of_a_run(columns: Mapping[str, object]) -> Mapping[str, object]:
    try:
        return from_record(dict(columns))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"this is no record of a run: {error!r}") from error
