"""Fine-tunes the starter's base model into a judge of steps, with the rule's labels.

The judge has the base's tokens and a few more, as those cannot write JSON, and more layers: to
compare a step with what it should be takes some after those that know what it should be.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from orchestration.starter.judge_data import (
    LabelledTrace,
    drawn_trace,
    question_and_reply,
)
from orchestration.starter.tokenizer import END, built_tokenizer
from orchestration.starter.training import IGNORED, Row, TrainingProgress, fit
from reward_services.model_judge.chat import question_text
from reward_services.model_judge.questions import KEY

NUM_LAYERS = 6
VOCABULARY_SIZE = 128  # a multiple of 64, with room beside the tokenizer's entries
TRACES_PER_STEP = 32
# Loss weight of the tokens of the steps, against 1 for a verdict. At first the model has to learn
# its arithmetic anew between the numbers of the steps; then what is wrong becomes visible to it.
READING_SHARE, READING_WEIGHT, WRITTEN_WEIGHT = 1 / 3, 1.0, 0.2
MAX_ANSWER_TOKENS = 64  # rollouts of the starter are cut off there


def judge_tokenizer() -> PreTrainedTokenizerFast:
    """The starter's tokens with the same ids, and those that a reply needs after them."""
    return built_tokenizer(more_characters='{}"_[]', more_words=(f'{{"{KEY}":', "null"))


def widened(base: Path, *, seed: int) -> Qwen2ForCausalLM:
    """The base model with room for the new tokens and with new layers that change nothing yet."""
    torch.manual_seed(seed)
    small = Qwen2ForCausalLM.from_pretrained(base)
    small.resize_token_embeddings(VOCABULARY_SIZE, mean_resizing=False)
    config = small.config
    num_known = config.num_hidden_layers
    config.num_hidden_layers = NUM_LAYERS
    config.layer_types = ["full_attention"] * NUM_LAYERS
    judge = Qwen2ForCausalLM(config)
    judge.load_state_dict(small.state_dict(), strict=False)
    for place, layer in enumerate(judge.model.layers[num_known:]):
        # What the known layers look at is a better start than nothing.
        layer.load_state_dict(judge.model.layers[place % num_known].state_dict())
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return judge


def train_judge(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    num_steps: int,
    with_reference: bool,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> None:
    """Train in place on endless seeded traces of training problems."""
    rng = random.Random(f"judge/{seed}")
    rows = partial(
        _rows, rng, tokenizer, seed=seed, num_steps=num_steps, with_reference=with_reference
    )
    fit(model, rows, num_steps=num_steps, on_progress=on_progress)


def cut_off(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """As much of an answer as a rollout could hold."""
    return str(tokenizer.decode(tokenizer(text)["input_ids"][:MAX_ANSWER_TOKENS]))


def _rows(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    step: int,
    *,
    seed: int,
    num_steps: int,
    with_reference: bool,
) -> list[Row]:
    is_reading = step < READING_SHARE * num_steps
    return [
        labelled_row(
            tokenizer,
            drawn_trace(
                rng,
                step * TRACES_PER_STEP + place,
                seed=seed,
                split="train",
                cut_off=partial(cut_off, tokenizer),
            ),
            with_reference=with_reference,
            written_weight=READING_WEIGHT if is_reading else WRITTEN_WEIGHT,
        )
        for place in range(TRACES_PER_STEP)
    ]


def labelled_row(
    tokenizer: PreTrainedTokenizerFast,
    trace: LabelledTrace,
    *,
    with_reference: bool,
    written_weight: float,
) -> Row:
    """A question and its reply, with more to learn from than the one token that matters.

    The end of each step is a shorter question: there the model learns what it would reply if the
    answer ended. Elsewhere in the steps it learns what is written next, as it has to know that to
    see that something else is written. Nothing of it changes how the model is asked later.
    """
    content, reply = question_and_reply(trace, with_reference=with_reference)
    text = question_text(tokenizer, [{"role": "user", "content": content}])
    parts: list[list[int]] = tokenizer(_parts(text, len(trace.ends)))["input_ids"]
    before, *steps, after = parts
    labels, weights = [IGNORED] * len(before), [0.0] * len(before)
    for number, step in enumerate(steps):
        said = _said_after(tokenizer, trace.first_wrong, number) if number else IGNORED
        labels += [said, *step[1:]]
        weights += [1.0, *[written_weight] * (len(step) - 1)]
    labels += [_said_after(tokenizer, trace.first_wrong, len(steps)), *[IGNORED] * (len(after) - 1)]
    answer = tokenizer(reply + str(tokenizer.eos_token))["input_ids"]
    ids = [token for part in parts for token in part]
    weights += [1.0] * (len(after) + len(answer))
    return Row(ids=ids + answer, labels=labels + answer, weights=weights)


def _parts(text: str, num_steps: int) -> list[str]:
    """What precedes the steps, each step with the line break or mark after it, and the rest."""
    marks, place = [], 0
    for number in range(1, num_steps + 1):
        place = text.index(f"\n[{number}] ", place) + 1
        marks.append(place)
    marks.append(text.rindex(END) + len(END))
    bounds = [0, *marks, len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def _said_after(tokenizer: PreTrainedTokenizerFast, first_wrong: int | None, num_steps: int) -> int:
    """The token that names the first wrong of so many steps; IGNORED where it takes two."""
    is_seen = first_wrong is not None and first_wrong <= num_steps
    name = str(first_wrong) if is_seen else "null"
    tokens = tokenizer(name)["input_ids"]
    return int(tokens[0]) if len(tokens) == 1 else IGNORED
