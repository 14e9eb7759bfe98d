"""How fast are scorers that are models, and what do many spans of one answer cost?

    python -m benchmarks.model_scorers            on the GPU where there is one
    python -m benchmarks.model_scorers --layers 12 --width 768

Prints for each kind the scores per second of one actor and the overhead of its service against the
bare model on the same batches. Then the time of scoring all T steps of one answer, against a single
score of the same answer and against T calls of one span each. The models have the starter model's
vocabulary, the given size and untrained weights: speed does not depend on what they say.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForTokenClassification as TokenClassifier

from grpo.types import FinishReason, Group, Origin, Prompt, Rollout, Span
from reward_services.asked_rollouts import AskedRollouts, asked_rollouts
from reward_services.config import ScorerConfig
from reward_services.implicit_reward import ImplicitReward
from reward_services.preference.encoder import Encoder, tokenizer_fingerprint
from reward_services.preference.head import HeadFacts, UtilityHead, save_head
from reward_services.preference.model import loaded_model
from reward_services.process_reward import ProcessReward
from reward_services.service import ScorerService
from reward_services.user_functions import Verdict

STARTER = Path(__file__).parents[1] / "orchestration" / "starter" / "model"
STEP_TOKENS, NUM_STEPS, GROUP_SIZE, BATCH_SIZE = 16, 16, 4, 64
LINE = "7+5=12 12*3=36\n"

Bare = Callable[[AskedRollouts], list[Verdict]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A scorer and the model inside it."""

    config: ScorerConfig
    bare: Bare


def subjects(folder: Path, *, layers: int, width: int) -> list[Subject]:
    """One of each kind, saved below the folder."""
    policy, classifier = folder / "policy", folder / "process_reward"
    config = AutoConfig.from_pretrained(STARTER)
    heads = max(width // 64, 1)
    config.update(
        {
            "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width,
            "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
            "max_position_embeddings": 4096, "layer_types": ["full_attention"] * layers,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    for path, kind in ((policy, AutoModelForCausalLM), (classifier, TokenClassifier)):
        kind.from_config(config).save_pretrained(path)
        AutoTokenizer.from_pretrained(STARTER).save_pretrained(path)
    _write_preference(folder / "preference", policy)
    settings: dict[str, dict[str, object]] = {
        "process_reward": {"model": str(classifier), "label": 1, "separator": "\n"},
        "implicit_reward": {"model": str(policy), "outcome": "answer"},
        "preference": {"folder": str(folder / "preference")},
    }
    configs = {
        kind: ScorerConfig.model_validate({"name": kind, kind: part, "deadline_s": 600})
        for kind, part in settings.items()
    }
    process, implicit = (
        configs["process_reward"].process_reward,
        configs["implicit_reward"].implicit_reward,
    )
    assert process is not None and implicit is not None
    bare: dict[str, Bare] = {
        "process_reward": ProcessReward(process).verdicts,
        "implicit_reward": ImplicitReward(implicit).verdicts,
        "preference": loaded_model(folder / "preference", encoder=None).verdicts,
    }
    return [Subject(config=configs[kind], bare=bare[kind]) for kind in settings]


def _write_preference(folder: Path, policy: Path) -> None:
    encoder = Encoder(str(policy), dtype="float32", largest_surprise=True)
    facts = HeadFacts(
        model=str(policy),
        encoder=encoder.fingerprint,
        tokenizer=tokenizer_fingerprint(str(policy)),
        encoder_dtype="float32",
        largest_surprise=True,
        num_features=encoder.num_features,
        hidden_units=512,
    )
    save_head(folder, UtilityHead(encoder.num_features, 512), facts)


def written_group(number: int) -> Group:
    """Distinct answers of NUM_STEPS steps; a token of the text is one character here."""
    rng = np.random.default_rng(number)
    text = (LINE * NUM_STEPS).ljust(STEP_TOKENS * NUM_STEPS, "\n")
    size = STEP_TOKENS * NUM_STEPS
    rollouts = tuple(
        Rollout(
            index=place,
            context=np.arange(4, 12, dtype=np.int32),
            tokens=rng.integers(4, 30, size).astype(np.int32),
            log_probs=np.zeros(size, np.float32),
            origins=np.full(size, Origin.POLICY, np.uint8),
            versions=np.zeros(size, np.int32),
            text=f"{number}+{place}".ljust(8) + text[8:],
            token_ends=np.arange(1, size + 1, dtype=np.int32),
            finish_reason=FinishReason.STOP,
        )
        for place in range(GROUP_SIZE)
    )
    prompt = Prompt(id=str(number), text="7 +5 *3", tokens=np.arange(4, 12, dtype=np.int32))
    return Group(id=number, prompt=prompt, rollouts=rollouts)


def steps_of(rollout: int, num_steps: int, *, is_prefix: bool) -> list[Span]:
    """An answer cut into equal steps, or its prefixes up to the end of each."""
    size = STEP_TOKENS * NUM_STEPS // num_steps
    return [
        Span(rollout=rollout, start=0 if is_prefix else k * size, end=(k + 1) * size)
        for k in range(num_steps)
    ]


def compared(subject: Subject, groups: Sequence[Group], repeats: int) -> tuple[float, float, float]:
    """(bare, service) seconds per score and batch fill, the best of some repeats in turns."""
    is_prefix = subject.config.preference is not None
    spans = [
        span
        for place in range(GROUP_SIZE)
        for span in steps_of(place, NUM_STEPS, is_prefix=is_prefix)
    ]
    bare, service = [], []
    for _ in range(repeats):
        before = time.perf_counter()
        for group in groups:
            items = [(group, span) for span in spans]
            subject.bare(asked_rollouts(items, scorer=subject.config.name))
        bare.append((time.perf_counter() - before) / (len(groups) * len(spans)))
        service.append(asyncio.run(in_service(subject.config, groups, spans)))
    seconds, fill = min(service)
    return min(bare), seconds, fill


async def in_service(
    config: ScorerConfig, groups: Sequence[Group], spans: Sequence[Span]
) -> tuple[float, float]:
    """(seconds per score, batch fill) with every group waiting at the same time."""
    service = ScorerService(config)
    await service.start()
    try:
        await service.score(written_group(10**6), spans)  # the first pass is slow
        service.statistics.num_calls = service.statistics.num_judged = 0
        before = time.perf_counter()
        found = await asyncio.gather(*[service.score(group, spans) for group in groups])
        seconds = time.perf_counter() - before
    finally:
        await service.close()
    failed = [score.failure for part in found for score in part if score.failure is not None]
    if failed:
        raise SystemExit(f"{config.name}: {len(failed)} scores failed, first: {failed[0]}")
    fill = service.statistics.batch_fill(config.batch_size)
    return seconds / (len(groups) * len(spans)), fill


def steps_cost(subject: Subject, num_steps: int, repeats: int) -> tuple[float, float]:
    """Seconds for all steps of one answer at once, and for one call each."""
    is_prefix = subject.config.preference is not None
    group = written_group(0)
    spans = steps_of(0, num_steps, is_prefix=is_prefix)
    together, apart = [], []
    for _ in range(repeats):
        before = time.perf_counter()
        subject.bare(asked_rollouts([(group, span) for span in spans], scorer="s"))
        between = time.perf_counter()
        for span in spans:
            subject.bare(asked_rollouts([(group, span)], scorer="s"))
        together.append(between - before)
        apart.append(time.perf_counter() - between)
    return min(together), min(apart)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="How fast are scorers that are models?")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = subjects(Path(folder), layers=options.layers, width=options.width)
        groups = [written_group(1 + number) for number in range(options.groups)]
        print(f"{'scorer':18} {'scores/s':>9} {'fill':>6} {'bare us':>9} {'us':>9} {'overhead':>9}")
        for subject in found:
            bare, service, fill = compared(subject, groups, options.repeats)
            print(
                f"{subject.config.name:18} {1 / service:9.0f} {fill:6.0%} {bare * 1e6:9.1f} "
                f"{service * 1e6:9.1f} {service / bare - 1:9.1%}"
            )
        print("\nall T steps of one answer, against one score of it / against one call a step:")
        for subject in found:
            one, _ = steps_cost(subject, 1, 3 * options.repeats)
            ratios = []
            for num_steps in (1, 2, 4, 8, 16):
                together, apart = steps_cost(subject, num_steps, 3 * options.repeats)
                ratios.append(f"T={num_steps} {together / one:.2f} / {together / apart:.2f}")
            print(f"{subject.config.name:18} {one * 1e3:6.1f} ms  " + "   ".join(ratios))


if __name__ == "__main__":
    main(sys.argv[1:])
