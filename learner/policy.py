"""The policy as the learner sees it: a causal language model that answers with log-probabilities.

Refuses to know the loss, the optimiser and how many ranks there are. Legend: B rows of a block,
L its length, N completion tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from grpo.errors import UserError
from learner.chunked_log_probs import EAGER, chunked_log_probs, log_softmax
from learner.compilers import fuses_log_probs
from learner.config import LearnerConfig, heads_problem
from learner.fused_log_probs import compile_now, fused
from learner.packing import Block
from learner.row_attention import ROW_ATTENTION, ROW_LENGTHS, SEQUENCE_GROUP
from learner.sequence_parallel import SequenceGroup

MAX_LOGITS = 2**26  # logits held at once: 256 MiB in float32
# Names of a recipe -> of transformers.
IMPLEMENTATIONS = {
    "sdpa": ROW_ATTENTION,
    "flash_attention_2": "flash_attention_2",
    "eager": "eager",
}
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # mean, of a log-probability


class Adapters(Protocol):
    """Low-rank matrices beside the model's own weights (learner/adapters.py)."""

    def disabled(self) -> AbstractContextManager[None]:
        """The model without them, until the context ends."""
        ...

    def weights(self) -> list[nn.Parameter]:
        """All of them."""
        ...

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The same by the names that peft's files have."""
        ...

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight of this name with what its adapter adds to it."""
        ...

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write copies of them for those who load peft's files."""
        ...


class LogProbHead(nn.Module):
    """The output layer, fused with log-softmax so that [N, V] never exists as a whole.

    One call per forward pass whatever N is: under ZeRO-3 each call gathers the weights on all
    ranks together, so a number of calls that differed between ranks would hang.
    """

    def __init__(self, head: nn.Linear, *, temperature: float, is_fused: bool) -> None:
        super().__init__()
        self.weight = head.weight  # the same Parameter: tied embeddings stay tied
        self.bias = head.bias
        self.temperature = temperature
        self.is_fused = is_fused
        self.vocabulary = head.weight.shape[0]  # ZeRO-3 empties the weight
        self.chunk_tokens = max(1, MAX_LOGITS // self.vocabulary)

    def prepare(self, device: torch.device) -> None:
        """Compile what is compiled for the device where the weights are."""
        if self.is_fused:
            compile_now(
                vocabulary=self.vocabulary,
                chunk_tokens=self.chunk_tokens,
                dtype=self.weight.dtype,
                device=device,
                temperature=self.temperature,
            )

    def forward(self, hidden: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
        """hidden [N, H], targets [N] -> log-probabilities [N] and, if asked for, entropy [N]."""
        if len(hidden) <= self.chunk_tokens and not self.is_fused:
            log_probs = self.log_probs(hidden)
            chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
            return (chosen, _entropy(log_probs)) if with_entropy else (chosen,)
        chosen, entropy = chunked_log_probs(
            hidden,
            self.weight,
            self.bias,
            targets,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            maths=fused() if self.is_fused else EAGER,
        )
        return (chosen, entropy) if with_entropy else (chosen,)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32; the weights must be whole (`Backend.output_layer`)."""
        return log_softmax(hidden, self.weight, self.bias, self.temperature)


def _entropy(log_probs: Tensor) -> Tensor:
    """[n, V] -> [n]"""
    return -(log_probs.exp() * log_probs).sum(-1)


class Policy(nn.Module):
    """A causal language model whose output layer is a LogProbHead."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, is_fused: bool) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear), f"the output layer is a {type(head).__name__}"
        self.model = model
        self.model.set_output_embeddings(
            LogProbHead(head, temperature=temperature, is_fused=is_fused)
        )
        self.adapters: Adapters | None = None  # None: all weights are trained
        self.sequence_group: SequenceGroup | None = None  # None: every line is on one rank

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predictors: Tensor,
        targets: Tensor,
        row_lengths: tuple[int, ...],
        with_entropy: bool = False,
        with_hidden: bool = False,
    ) -> tuple[Tensor, ...]:
        """The fields of a Block -> log-probabilities [N]; if asked for, entropy [N], hidden [N, H].

        A hidden state is what the output layer multiplies to predict its token.

        Rows are kept apart by `row_lengths`; implementations of transformers itself read from
        `position_ids`, where they restart, where a row begins.
        """
        group = self.sequence_group
        if group is not None:
            missing = max(0, group.size - input_ids.shape[1])
            if missing:  # models take no empty line: a row that nobody reads fills the other ranks
                input_ids, position_ids = (
                    pad(input_ids, (0, missing)),
                    pad(position_ids, (0, missing)),
                )
                row_lengths = (*row_lengths, missing)
            start, end = group.span(input_ids.shape[1])
            input_ids, position_ids = input_ids[:, start:end], position_ids[:, start:end]
            is_mine = (predictors >= start) & (predictors < end)
            predictors, targets = predictors[is_mine] - start, targets[is_mine]
        output = self.model.get_decoder()(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            **{ROW_LENGTHS: row_lengths, SEQUENCE_GROUP: group},
        )
        hidden = output.last_hidden_state.flatten(0, 1)[predictors]
        outputs = self.head(hidden, targets, with_entropy)
        outputs = (*outputs, hidden) if with_hidden else outputs
        if group is not None:
            outputs = tuple(group.gathered(part, is_mine) for part in outputs)
        return cast(tuple[Tensor, ...], outputs)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight of `named_weights` with what its adapter adds to it."""
        return weight if self.adapters is None else self.adapters.merged(name, weight)

    @property
    def head(self) -> LogProbHead:
        return cast(LogProbHead, self.model.get_output_embeddings())


def adapters_of(policy: Policy) -> dict[str, nn.Parameter]:
    """Every A and B of a policy that has adapters, by name."""
    assert policy.adapters is not None, "the policy has no adapters"
    return policy.adapters.named_weights()


def policy_inputs(block: Block, device: torch.device) -> dict[str, Any]:
    """The arguments of Policy.forward."""
    return {
        "input_ids": block.input_ids.to(device),
        "position_ids": block.position_ids.to(device),
        "predictors": block.predictors.to(device),
        "targets": block.targets.to(device),
        "row_lengths": block.row_lengths,
    }


def load_policy(model: str, config: LearnerConfig, *, temperature: float) -> Policy:
    """Read a model from a folder or the hub, on CPU, and verify that rows may be packed."""
    is_fused = fuses_log_probs(config)
    disable_progress_bar()  # a bar per rank says nothing
    dtype = getattr(torch, config.dtype)
    settings = AutoConfig.from_pretrained(model)
    for name, value in settings.to_dict().items():
        # A dropped-out policy is not the one that sampled: its ratio would be noise.
        if "drop" in name and isinstance(value, float):
            setattr(settings, name, 0.0)
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        config=settings,
        dtype=dtype,
        attn_implementation=IMPLEMENTATIONS[config.attn_implementation],
    )
    if config.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    refuse_unpackable(loaded, model)
    return Policy(loaded, temperature=temperature, is_fused=is_fused).train()


@torch.no_grad()
def refuse_unpackable(model: PreTrainedModel, name: str) -> None:
    """Compare two packed rows with transformers' own answer to the second of them alone.

    Catches models that see across rows (recurrent layers) and models whose logits are more than
    their output layer applied to the last hidden state (soft-capped or scaled logits).
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(1, 17).mul(7919).remainder(vocabulary)[None]  # arbitrary, all differ
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    decoder = model.get_decoder()
    hidden = decoder(
        input_ids=tokens, position_ids=positions, use_cache=False, **{ROW_LENGTHS: (7, 9)}
    ).last_hidden_state
    packed = model.get_output_embeddings()(hidden[:, 7:]).float().log_softmax(-1)
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    alone = model(input_ids=tokens[:, 7:], use_cache=False).logits.float().log_softmax(-1)
    model.set_attn_implementation(chosen)
    if not (packed.isfinite().all() and alone.isfinite().all()):
        raise UserError(
            f"model {name} answers with log-probabilities that are no numbers: {_spoilt(model)}"
        )
    gap = (packed - alone).abs().mean().item()
    if gap > PROBE_TOLERANCE[model.dtype]:
        raise UserError(
            f"model {name} ({type(model).__name__}) cannot be trained here: a row packed behind "
            f"another gets log-probabilities that differ by {gap:.3g} from the model's own. Its "
            "layers see across rows, or its logits are scaled after the output layer. Choose a "
            "decoder with plain attention and an unscaled output layer (Qwen, Llama, Mistral)"
        )


def _spoilt(model: PreTrainedModel) -> str:
    """What a user can do about it: the weights that are no numbers, or the type of all of them."""
    bad = [key for key, weight in model.state_dict().items() if not weight.isfinite().all()]
    if not bad:
        return (
            f"all its weights are finite, so its activations overflow in {model.dtype}; set "
            "learner.dtype to the type that it was trained in"
        )
    others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"found NaN or infinity in {', '.join(bad[:3])}{others}, expected finite weights. Copy or "
        "download the model again, or start from a checkpoint before the one that spoilt it"
    )


def refuse_unshareable(model: PreTrainedModel, sequence_parallel: int) -> None:
    """Heads that a sequence group cannot share out, and positions that depend on the whole line."""
    if sequence_parallel == 1:
        return
    shape = model.config.get_text_config()
    heads = shape.num_attention_heads
    key_heads = getattr(shape, "num_key_value_heads", None) or heads  # not named: each its own
    if problem := heads_problem(
        heads=heads, key_heads=key_heads, sequence_parallel=sequence_parallel
    ):
        raise UserError(problem)
    rotary = str(getattr(shape, "rope_parameters", None))
    if "'dynamic'" in rotary or "'longrope'" in rotary:
        raise UserError(
            f"{type(model).__name__} scales its positions by the longest of a line, which a rank "
            "does not see: leave learner.sequence_parallel out"
        )
