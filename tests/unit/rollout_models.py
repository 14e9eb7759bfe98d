"""Tiny random models, requests for them, and the log-probabilities that transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import safetensors.torch
import torch
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from grpo.types import AdapterShape, Rollout, SampleRequest, Sampling, WeightBundle

MAX_MODEL_LEN = 256
EOS_ID = 256


def byte_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte (token id = place in the byte alphabet), then <eos> and <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", extra_special_tokens=["<end>"]
    )
    fast.chat_template = chat_template
    return fast


def make_model(folder: Path, *, tied: bool) -> str:
    """Save a random two-layer model and its tokenizer into `folder`."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=258,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # far from uniform: a stricter comparison
            parameter.data.mul_(4.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def policy(folder: str, *, seed: int) -> PreTrainedModel:
    """The saved model moved away by some noise; seed 0: as saved."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.05 if seed else 0.0)
    return model.eval()


def adapted(
    folder: str, shape: AdapterShape, *, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The saved model with random adapters beside it, far from zero."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    targets = shape.target_modules
    settings = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=False,  # else B would be zero
    )
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(settings, model)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()
    return model.eval()


def adapter_bundle(model: PreTrainedModel, shape: AdapterShape, version: int) -> WeightBundle:
    """The adapters of such a model under the names that peft gives them in a file."""
    weights = {
        f"base_model.model.{name.replace('.default.', '.')}": weight.data
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
    payload = np.frombuffer(safetensors.torch.save(weights), np.uint8)
    checksum = xxhash.xxh3_64_intdigest(payload)
    return WeightBundle(version=version, payload=payload, checksum=checksum, adapters=shape)


def bundle(model: PreTrainedModel, version: int) -> WeightBundle:
    """All weights of a model; a tied head is not among them."""
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    payload = np.frombuffer(safetensors.torch.save(weights), np.uint8)
    return WeightBundle(
        version=version, payload=payload, checksum=xxhash.xxh3_64_intdigest(payload)
    )


def requests(
    count: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 24,
    guidance: tuple[int, ...] = (),
) -> list[SampleRequest]:
    """`count` rollouts of one group; contexts of different lengths, two rollouts each."""
    rng = np.random.default_rng(3)
    contexts = [rng.integers(0, 256, 5 + 3 * pair).astype(np.int32) for pair in range(count)]
    return [
        SampleRequest(
            group=0,
            index=index,
            context=contexts[index // 2],
            guidance=np.asarray(guidance, np.int32),
            sampling=Sampling(
                temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens
            ),
            seed=1000 * seed + index,
        )
        for index in range(count)
    ]


@torch.no_grad()
def expected_log_probs(
    model: PreTrainedModel, rollout: Rollout, *, temperature: float = 1.0
) -> NDArray[np.float32]:
    """[T] what the learner computes for the tokens of a rollout."""
    sequence = torch.tensor([[*rollout.context.tolist(), *rollout.tokens.tolist()]])
    logits = model(sequence).logits[0, len(rollout.context) - 1 : -1]
    log_probs = (logits / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, sequence[0, len(rollout.context) :, None])
    return chosen[:, 0].numpy()


def largest_gap(
    model: PreTrainedModel, rollouts: list[Rollout], *, temperature: float = 1.0
) -> float:
    """The largest difference to transformers over all sampled tokens."""
    return max(
        float(np.abs(rollout.log_probs - expected)[rollout.versions >= 0].max())
        for rollout in rollouts
        for expected in [expected_log_probs(model, rollout, temperature=temperature)]
    )
