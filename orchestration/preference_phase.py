"""Phase I of WS-GRPO: answers of the initial policy, labelled, become a preference model.

Everything runs in this process, from the recipe of the run that will use the model. Refuses to
know how a pair is learned from: reward_services/preference does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.algorithms import grpo
from grpo.errors import UserError
from grpo.types import Prompt
from orchestration.config import Recipe
from orchestration.group_task import (
    DroppedGroup,
    FinishedGroup,
    GroupRecipe,
    ScorerRole,
    run_group,
)
from orchestration.local import LocalRolloutWorker
from orchestration.run_inputs import held_out_prompts, planned_order
from reward_services.config import ScorerConfig
from reward_services.preference.config import PreferenceConfig
from reward_services.preference.encoder import Encoder, tokenizer_fingerprint
from reward_services.preference.head import FACTS_FILE, HeadFacts, save_head
from reward_services.preference.model import loaded_parts
from reward_services.preference.questions import (
    COLLECTION_FILE,
    Collection,
    Question,
    labelled_questions,
    read_collection,
    split,
    write_collection,
)
from reward_services.preference.training import (
    PreferenceReport,
    encoded_pairs,
    measured,
    trained_head,
)
from reward_services.service import ScorerService
from rollout_workers.tokenization import Tokenization
from rollout_workers.worker import RolloutWorker

MAX_CONCURRENT_QUESTIONS = 1000  # vLLM holds the requests of so many in memory without trouble
MAX_DROPPED_SHARE = 0.1  # above it the rest would not be a fair picture of the policy
REPORT_FILE = "report.json"
EVALUATION_GROUPS = 1 << 40  # other group ids than the collection's: other seeds

OnPhase = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceParts:
    """What a recipe says about its preference model."""

    recipe: Recipe
    preference: PreferenceConfig
    labels: ScorerConfig  # says which answers are right

    @property
    def folder(self) -> Path:
        return Path(self.preference.folder)


def preference_parts(recipe: Recipe) -> PreferenceParts:
    """UserError unless the recipe has one preference model and a scorer of whole answers."""
    found = [scorer.preference for scorer in recipe.scorers if scorer.preference is not None]
    others = [scorer for scorer in recipe.scorers if scorer.preference is None]
    if len(found) != 1 or not others:
        raise UserError(
            f"recipe {recipe.name} has {len(found)} preference models and {len(others)} other "
            "scorers; expected one scorer like {name: preference, preference: {folder: "
            "models/preference}} and another one that says which answers are right"
        )
    labels = max(others, key=lambda scorer: scorer.weight)
    return PreferenceParts(recipe=recipe, preference=found[0], labels=labels)


def is_trained(parts: PreferenceParts) -> bool:
    """Whether the folder holds a preference model."""
    return (parts.folder / FACTS_FILE).is_file()


def is_collected(parts: PreferenceParts) -> bool:
    """Whether the folder holds labelled answers."""
    return (parts.folder / COLLECTION_FILE).is_file()


def collect(parts: PreferenceParts, on_phase: OnPhase) -> Collection:
    """Answer training prompts with the initial policy and write the labelled answers."""
    recipe, wanted = parts.recipe, parts.preference.num_questions
    chosen = planned_order(recipe, Tokenization(recipe.model)).distinct(wanted)
    on_phase(f"{parts.preference.rollouts_per_question} answers to {len(chosen)} prompts")
    questions, num_dropped = asyncio.run(_answered(parts, chosen, first_group=0))
    rollouts = [rollout for question in questions for rollout in question.rollouts]
    collection = Collection(
        model=recipe.model,
        weights=_encoder(parts.preference, recipe.model).fingerprint,
        tokenizer=tokenizer_fingerprint(recipe.model),
        num_questions=len(questions),
        num_rollouts=len(rollouts),
        num_right=sum(rollout.is_right for rollout in rollouts),
        num_dropped=num_dropped,
    )
    write_collection(parts.folder, questions, collection)
    return collection


def train(parts: PreferenceParts, on_phase: OnPhase) -> PreferenceReport:
    """Train on most of the labelled prompts, measure on the others, write model and report."""
    config, seed = parts.preference, parts.recipe.seed
    questions, collection = read_collection(parts.folder)
    model = parts.recipe.model if config.encoder is None else config.encoder
    encoder = _encoder(config, model)
    _require_fitting(parts, collection, model, encoder)
    training, held_out = split(questions, share=config.validation_share, seed=seed)
    on_phase(f"encoding the answers to {len(questions)} prompts")
    pairs = encoded_pairs(encoder, training, config, seed=seed)
    on_phase(f"training on {len(pairs.winners)} pairs of {pairs.num_questions} prompts")
    head = trained_head(pairs, config, seed=seed)
    report = measured(head, encoded_pairs(encoder, held_out, config, seed=seed))
    facts = HeadFacts(
        model=model,
        encoder=encoder.fingerprint,
        tokenizer=collection.tokenizer,
        encoder_dtype=config.encoder_dtype,
        largest_surprise=config.largest_surprise,
        num_features=encoder.num_features,
        hidden_units=config.hidden_units,
    )
    save_head(parts.folder, head, facts)
    (parts.folder / REPORT_FILE).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return report


def evaluate(parts: PreferenceParts, on_phase: OnPhase) -> PreferenceReport:
    """Measure the trained model on new answers to the recipe's evaluation prompts."""
    recipe = parts.recipe
    if recipe.data.evaluation is None:
        raise UserError(
            f"recipe {recipe.name} has no data.evaluation to measure the preference model on; "
            f"its figures on held-out training prompts are in {parts.folder / REPORT_FILE}"
        )
    encoder, head = loaded_parts(parts.folder, encoder=parts.preference.encoder)
    chosen = held_out_prompts(recipe, Tokenization(recipe.model))
    on_phase(f"{parts.preference.rollouts_per_question} answers to {len(chosen)} prompts")
    questions, _ = asyncio.run(_answered(parts, chosen, first_group=EVALUATION_GROUPS))
    pairs = encoded_pairs(encoder, questions, parts.preference, seed=recipe.seed)
    return measured(head, pairs)


def _encoder(config: PreferenceConfig, model: str) -> Encoder:
    return Encoder(model, dtype=config.encoder_dtype, largest_surprise=config.largest_surprise)


def _require_fitting(
    parts: PreferenceParts, collection: Collection, model: str, encoder: Encoder
) -> None:
    """The answers must be the recipe's model's, and the encoder must read their tokens."""
    remedy = "collect anew, with covey preference collect RECIPE"
    if parts.preference.encoder is None and encoder.fingerprint != collection.weights:
        raise UserError(
            f"the answers in {parts.folder} are those of {collection.model} (sha256 "
            f"{collection.weights[:12]}), but the recipe's model {model} has sha256 "
            f"{encoder.fingerprint[:12]}: {remedy}"
        )
    if tokenizer_fingerprint(model) != collection.tokenizer:
        raise UserError(
            f"the answers in {parts.folder} are tokens of {collection.model}, but {model} has "
            f"another vocabulary: choose another preference.encoder, or {remedy}"
        )


async def _answered(
    parts: PreferenceParts, prompts: Sequence[Prompt], *, first_group: int
) -> tuple[list[Question], int]:
    """The prompts with their labelled answers, and how many could not be answered or scored."""
    recipe = parts.recipe
    worker = RolloutWorker(recipe.model, recipe.rollout, recipe.max_model_len)
    service = ScorerService(parts.labels)
    try:
        await service.start()
        await worker.start()
        common = _group_recipe(parts, LocalRolloutWorker(worker), service)
        done = await _all_groups(
            common, prompts, first_group=first_group, at_a_time=_questions_at_a_time(parts)
        )
    finally:
        await worker.close()
        await service.close()
    dropped = [item.dropped for item in done if isinstance(item, DroppedGroup)]
    if len(dropped) > MAX_DROPPED_SHARE * len(prompts):
        raise UserError(
            f"{len(dropped)} of {len(prompts)} prompts could not be answered or labelled; the "
            f"first: {dropped[0].prompt}: {dropped[0].reason}: {dropped[0].detail}"
        )
    groups = [item.group for item in done if isinstance(item, FinishedGroup)]
    return labelled_questions(groups, scorer=parts.labels.name), len(dropped)


def _group_recipe(
    parts: PreferenceParts, engine: LocalRolloutWorker, service: ScorerService
) -> GroupRecipe:
    """Groups as GRPO has them: K independent answers, each judged as a whole."""
    recipe, name = parts.recipe, parts.labels.name
    return GroupRecipe(
        pipeline=grpo.pipeline(
            grpo.Config(num_generations=parts.preference.rollouts_per_question),
            outcomes={name: 1.0},
            max_completion_length=recipe.sampling.max_completion_length,
        ),
        sampling=recipe.sampling.drawn(),
        run_seed=recipe.seed,
        engine=engine,
        tokenizer=Tokenization(recipe.model),
        scorers={name: ScorerRole(scorer=service, stop_on_failure=False)},
    )


async def _all_groups(
    common: GroupRecipe, prompts: Sequence[Prompt], *, first_group: int, at_a_time: int
) -> list[FinishedGroup | DroppedGroup]:
    done: list[FinishedGroup | DroppedGroup] = []
    for start in range(0, len(prompts), at_a_time):
        async with asyncio.TaskGroup() as tasks:
            part = [
                tasks.create_task(run_group(common, first_group + start + place, prompt, None))
                for place, prompt in enumerate(prompts[start : start + at_a_time])
            ]
        done += [task.result() for task in part]
    return done


def _questions_at_a_time(parts: PreferenceParts) -> int:
    """vLLM queues what it has no room for; the small engine begins anew when a request joins."""
    rollout, answers = parts.recipe.rollout, parts.preference.rollouts_per_question
    if rollout.engine == "vllm":
        return MAX_CONCURRENT_QUESTIONS
    return max(rollout.max_concurrent_rollouts // answers, 1)
