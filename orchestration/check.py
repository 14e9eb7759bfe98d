"""Everything that can be known before a run: packages, machine, model, data, scorers.

Every check runs, whatever the others found. Starts no engine, no learner and no cluster, and
writes nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from grpo.algorithms.user_file import is_file_name
from grpo.errors import CoveyError, UserError
from grpo.types import FinishReason, Group, Int32, Origin, Prompt, Rollout, Score, Span
from learner.compilers import fuses_log_probs
from orchestration.check_data import data_checks, require_domains
from orchestration.check_model import heads_fit, model_facts, vocabulary_fits
from orchestration.config import Recipe
from orchestration.placement import shortage, total
from orchestration.prompts import PromptSet
from orchestration.roles import local_recipe
from orchestration.versions import software_versions
from reward_services.config import ScorerConfig
from reward_services.model_config import ImplicitRewardConfig
from reward_services.preference.config import PreferenceConfig
from reward_services.service import ScorerService
from rollout_workers.tokenization import Tokenization

SAMPLE_TEXT = "answer: 12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    name: str
    ok: bool
    detail: str

    def line(self) -> str:
        """For example `ok       data.train  8000 prompts`."""
        first, *more = self.detail.split("\n")
        head = f"{'ok' if self.ok else 'problem':8} {self.name:15} {first}"
        return "\n".join([head, *(" " * 25 + line for line in more)])


def checked(recipe: Recipe, *, local: bool = False) -> Iterator[Finding]:
    """One finding per check, in the order in which a run would meet them."""
    recipe = local_recipe(recipe) if local else recipe
    yield from _tried("versions", lambda: _versions(recipe, local))
    yield from _tried("machine", lambda: _machine(recipe, local))
    model = list(_tried("model", lambda: model_facts(recipe.model, recipe.max_model_len)))
    yield from model
    yield from _tried("heads", lambda: heads_fit(recipe.model, recipe.learner.sequence_parallel))
    yield from _tried("output layer", lambda: _output_layer(recipe))
    yield from _tried("rollout", lambda: _rounded(recipe))
    yield from _tried("KV cache", lambda: _kv_cache(recipe, local))
    tokenizers: list[Tokenization] = []
    if Path(recipe.model).is_dir() or model[0].ok:  # else the hub would be asked again, in vain
        yield from _tried("tokenizer", lambda: _tokenizer(recipe.model, tokenizers))
        yield from _tried("adapters", lambda: _adapters(recipe))
    sets: list[PromptSet] = []  # those of data.train that can be read
    for setting, read in data_checks(recipe, tokenizers[0] if tokenizers else None, sets):
        yield from _tried(setting, read)
    yield from _tried("algorithm", lambda: _algorithm(recipe, sets))
    for scorer in recipe.scorers:
        if scorer.preference is not None:
            check = partial(_preference, scorer, scorer.preference, recipe.model)
        elif scorer.implicit_reward is not None:
            check = partial(_implicit_reward, scorer, scorer.implicit_reward, recipe.model)
        else:
            check = partial(_scorer, scorer, sets)
        yield from _tried(f"scorer {scorer.name}", check)


def _tried(name: str, check: Callable[[], str | None]) -> Iterator[Finding]:
    """The detail that a check returns, or the problem that it raises; None: nothing to say."""
    try:
        detail = check()
    except CoveyError as error:
        yield Finding(name=name, ok=False, detail=str(error))
    else:
        if detail is not None:
            yield Finding(name=name, ok=True, detail=detail)


def _versions(recipe: Recipe, local: bool) -> str:
    needed = {"torch": "the learner", "transformers": "the tokenizer"}
    if recipe.rollout.engine == "vllm":
        needed["vllm"] = "rollout.engine: vllm (or set it to transformers)"
    if recipe.learner.backend == "deepspeed":
        needed["deepspeed"] = "learner.backend: deepspeed (or set it to torch)"
    lora = recipe.learner.lora
    if lora is not None and lora.quantization is not None:
        needed["bitsandbytes"] = (
            f"learner.lora.quantization: {lora.quantization} "
            "(pip install bitsandbytes, or leave quantization out)"
        )
    if "wandb" in recipe.trackers:
        needed["wandb"] = "trackers: [wandb]"
    if not local:
        needed["ray"] = "a run through Ray (or add --local)"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        lines = [f"{name} is not installed, but needed for {needed[name]}" for name in missing]
        raise UserError("\n".join(lines))
    found = software_versions()
    return ", ".join(f"{name} {found[name]}" for name in found if name != "commit")


def _machine(recipe: Recipe, local: bool) -> str:
    cpus, gpus = total(recipe)
    if os.environ.get("RAY_ADDRESS") and not local:
        return f"needs {cpus:g} CPUs and {gpus:g} GPUs of the cluster at RAY_ADDRESS"
    has_cpus, has_gpus = os.cpu_count() or 1, _num_gpus() if gpus else 0
    # CPUs are shared out by the operating system: too few are slow, too few GPUs do not start.
    if problem := shortage(recipe, {"CPU": max(cpus, has_cpus), "GPU": has_gpus}):
        raise UserError(problem)
    note = "" if cpus <= has_cpus else f" (fewer than the {cpus:g} asked for: roles will share)"
    return f"{has_cpus} CPUs{note}, {has_gpus} GPUs" if gpus else f"{has_cpus} CPUs{note}"


def _output_layer(recipe: Recipe) -> str | None:
    return "compiled into fused kernels" if fuses_log_probs(recipe.learner) else None


def _num_gpus() -> int:
    import torch  # takes seconds, so only where a recipe asks for GPUs

    return torch.cuda.device_count()


def _tokenizer(model: str, tokenizers: list[Tokenization]) -> str:
    tokenizer = Tokenization(model)
    sample = tokenizer.encode_text(SAMPLE_TEXT)
    if not len(sample):  # transformers makes an empty one for a known architecture
        raise UserError(
            f"model folder {model} holds no tokenizer: {SAMPLE_TEXT!r} gives no token; expected "
            "tokenizer.json and tokenizer_config.json beside the weights"
        )
    vocabulary_fits(model, int(sample.max()), tokenizer.stop_ids)
    tokenizers.append(tokenizer)
    return f"ends answers with token {', '.join(map(str, tokenizer.stop_ids))}"


def _adapters(recipe: Recipe) -> str | None:
    lora = recipe.learner.lora
    if lora is None:
        return None
    from rollout_workers.adapted_layers import adapted_layers  # loads torch

    try:
        layers = adapted_layers(recipe.model, lora.shape)
    except (OSError, ValueError) as error:  # found under `model`, too
        raise UserError(f"the layers of {recipe.model} cannot be told: {error}") from error
    published = {"merged": "merged into all weights", "adapter": "by themselves"}[lora.publish]
    base = "" if lora.quantization is None else f", base held in {lora.quantization}"
    return f"rank {lora.rank} beside {len(layers)} layers, published {published}{base}"


def _rounded(recipe: Recipe) -> str | None:
    """What fp8 in the rollouts asks of the rest; the recipe refuses an alarm that is too tight."""
    rollout, settings = recipe.rollout, recipe.algorithm.settings
    if not rollout.fp8_settings:
        return None
    found = (
        "off (algorithm.importance_cap: null), right only where no importance weight is needed"
        if settings.importance_cap is None
        else f"{settings.correction}, importance_cap {settings.importance_cap:g}"
    )
    return (
        f"{', '.join(rollout.fp8_settings)}: tokens are sampled by a rounding of the policy\n"
        f"correction in the loss: {found}; alarms.log_prob_gap {recipe.alarms.log_prob_gap:g}"
    )


def _kv_cache(recipe: Recipe, local: bool) -> None:
    """On the CPU it is taken at once, from memory that a cluster's nodes may have more of."""
    rollout = recipe.rollout
    has_it = rollout.engine == "vllm" and rollout.gpus_per_worker == 0
    if not has_it or (os.environ.get("RAY_ADDRESS") and not local):
        return
    has_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    needs_gib = rollout.workers * rollout.kv_cache_gib
    if needs_gib > has_gib:
        raise UserError(
            f"rollout.kv_cache_gib is {rollout.kv_cache_gib:g} for each of {rollout.workers} "
            f"engines, but this machine has {has_gib:.0f} GiB of memory: lower it (0.5 is usual "
            "for a small model), or rollout.workers"
        )


def _algorithm(recipe: Recipe, sets: Sequence[PromptSet]) -> str:
    choice, groups = recipe.algorithm, recipe.num_prompts_per_step
    if is_file_name(choice.name):
        _try_own_algorithm(recipe, sets[0].prompts[0] if sets else None)
    if len(sets) == len(recipe.data.train):
        require_domains(choice.settings.domains, sets)
    return (
        f"{choice.name}: {groups} groups of {recipe.num_generations} rollouts a step, "
        f"{recipe.updates_per_step} update{'s' if recipe.updates_per_step > 1 else ''}, "
        f"at most {recipe.max_staleness} steps stale"
    )


def _try_own_algorithm(recipe: Recipe, prompt: Prompt | None) -> None:
    """What reading a user's composition could not tell."""
    from orchestration.explain.dry_run import require_dry_run  # loads torch

    choice = recipe.algorithm
    require_dry_run(
        choice.algorithm.pipeline(
            choice.settings,
            outcomes=recipe.weights,
            max_completion_length=recipe.sampling.max_completion_length,
        ),
        choice.algorithm.objective(choice.settings),
        scorers=recipe.weights,
        num_generations=recipe.num_generations,
        prompt=prompt,
        file=Path(choice.name.rpartition(":")[0]),
    )


def _scorer(config: ScorerConfig, sets: Sequence[PromptSet]) -> str:
    """Score the first prompt's right answer and a wrong one, as the run would."""
    if not sets:
        raise UserError("not tried, as no prompt could be read")
    prompt = sets[0].prompts[0]
    solution = prompt.columns["solution"] if "solution" in prompt.columns else None
    right = solution if isinstance(solution, str) else f"answer: {prompt.reference}"
    texts = ([] if prompt.reference is None else [right]) + ["no answer"]
    scores = asyncio.run(_tried_scores(config, written(prompt, texts)))
    if failed := next((s for s in scores if s.failure is not None), None):
        raise UserError(
            f"the function failed on prompt {prompt.id} with the completion "
            f"{texts[failed.span.rollout]!r:.60}: {failed.failure}\n"
            "expected a finite number, or None where it does not apply"
        )
    shown = [
        f"{'no score' if s.value is None else f'{s.value:g}'} for {texts[s.span.rollout]!r:.40}"
        for s in scores
    ]
    return ", ".join(shown)


def _preference(config: ScorerConfig, preference: PreferenceConfig, model: str) -> str:
    """It reads the policy's tokens, and its encoder is the one that it was trained on."""
    from reward_services.preference.model import require_tokenizer  # loads torch

    folder = Path(preference.folder)
    require_tokenizer(folder, model)
    nothing = Group(id=0, prompt=Prompt(id="none", text="", tokens=np.zeros(1, np.int32)))
    asyncio.run(_tried_scores(config, nothing))
    return f"preference model of {folder}"


def _implicit_reward(config: ScorerConfig, implicit: ImplicitRewardConfig, model: str) -> str:
    """It reads the policy's tokens, and both of its models can be loaded."""
    from reward_services.preference.encoder import tokenizer_fingerprint  # loads torch

    if tokenizer_fingerprint(implicit.model) != tokenizer_fingerprint(model):
        raise UserError(
            f"implicit_reward.model {implicit.model} has another vocabulary than {model}, whose "
            "tokens it has to read: start it from a model of the same family"
        )
    nothing = Group(id=0, prompt=Prompt(id="none", text="", tokens=np.zeros(1, np.int32)))
    asyncio.run(_tried_scores(config, nothing))
    return f"learns from {implicit.outcome}, starting from {implicit.model}"


async def _tried_scores(config: ScorerConfig, group: Group) -> list[Score]:
    service = ScorerService(config)
    try:
        await service.start()
        spans = [Span(rollout=r.index, start=0, end=r.num_tokens) for r in group.rollouts]
        return await service.score(group, spans)
    finally:
        await service.close()


def written(prompt: Prompt, texts: Sequence[str]) -> Group:
    """A group as if the policy had written these texts, one token a character."""
    rollouts = tuple(
        Rollout(
            index=i,
            context=prompt.tokens,
            tokens=np.zeros(len(text), np.int32),
            log_probs=np.zeros(len(text), np.float32),
            origins=np.full(len(text), Origin.POLICY, np.uint8),
            versions=np.zeros(len(text), np.int32),
            text=text,
            token_ends=cast(Int32, np.arange(1, len(text) + 1, dtype=np.int32)),
            finish_reason=FinishReason.STOP,
        )
        for i, text in enumerate(texts)
    )
    return Group(id=0, prompt=prompt, rollouts=rollouts)
