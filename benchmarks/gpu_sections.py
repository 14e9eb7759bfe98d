"""The sections of benchmarks/gpu.py: each builds what it needs and says one line."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.learner_step import long_tailed_rows
from grpo.types import Int32, SampleRequest, Sampling, TrainBatch
from grpo.weight_group import WeightGroup
from grpo.weight_stream import WeightStream
from learner.config import LearnerConfig
from learner.inputs import stream
from learner.packing import Block, blocks
from learner.rank import LearnerRank
from orchestration.local import LocalLearner, LocalRolloutWorker
from orchestration.weight_sync import agreement, sync_weights
from rollout_workers.config import RolloutConfig
from rollout_workers.worker import RolloutWorker
from tests.unit.rollout_models import byte_tokenizer

TURNS = 3
MAX_TOKENS = 8192  # of a micro-batch
SEED = 0
# Dense bfloat16 FLOP/s that the makers state, by a part of the device's name: the first one counts.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, and how much work it is given."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rows: int  # of a step
    rollouts: int
    tokens: int  # of a rollout


SIZES = {
    "tiny": Size(
        hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384, vocabulary=512,
        rows=16, rollouts=16, tokens=32,
    ),
    "0.5B": Size(
        hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936,
        rows=256, rollouts=256, tokens=256,
    ),
    "1.5B": Size(
        hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936,
        rows=256, rollouts=256, tokens=256,
    ),
}  # fmt: skip


def _model(size: str, folder: str, device: str) -> str:
    """Write the model, with a tokenizer that nobody looks into."""
    disable_progress_bar()
    shape = SIZES[size]
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return f"{model.num_parameters() / 1e6:.1f}M parameters written"


def _learner_against_bare(size: str, folder: str, device: str) -> str:
    rows = long_tailed_rows(SIZES[size].rows, vocabulary=SIZES[size].vocabulary)
    batch = TrainBatch(step=1, version=0, updates=(rows,))
    seconds = _seconds_of(partial(_learner(folder, device).train, batch), device)
    gc.collect()  # the learner, before the bare loop takes as much
    packed = blocks(rows, max_tokens=MAX_TOKENS, rank=0, ranks=1)
    bare, num_parameters = _bare_loop(folder, packed, device)
    bare_seconds = _seconds_of(bare, device)
    lengths = [row.num_tokens for row in rows]
    tokens = sum(lengths)
    flops = _flops(SIZES[size], num_parameters, lengths)
    peak = next((value for name, value in PEAKS.items() if name in device_name(device)), None)
    share = "peak not known" if peak is None else f"{flops / seconds / peak:.1%} of peak FLOP/s"
    return (
        f"{tokens / seconds:.0f} tokens/s ({share}), bare {tokens / bare_seconds:.0f}, "
        f"learner / bare {bare_seconds / seconds:.3f}"
    )


def _flops(size: Size, num_parameters: int, lengths: Sequence[int]) -> float:
    """Of forward and backward: 6 for each weight and token, and causal attention's two products.

    Attention of a row of L tokens: 2 products x 2 FLOP x hidden x L^2 / 2, three times, per layer.
    """
    attention = 6 * size.layers * size.hidden * sum(length**2 for length in lengths)
    return 6.0 * num_parameters * sum(lengths) + attention


def _bare_loop(
    folder: str, micro_batches: Sequence[Block], device: str
) -> tuple[Callable[[], None], int]:
    """What anybody would write by hand, with float32 master weights; and the parameters."""
    policy = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    policy.to(device).train()
    weights = list(policy.parameters())
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, weight_decay=0.0)
    place = torch.device(device)

    def run() -> None:
        for block in micro_batches:
            hidden = policy.model(
                input_ids=block.input_ids.to(place),
                position_ids=block.position_ids.to(place),
                use_cache=False,
            ).last_hidden_state
            predicted = hidden.flatten(0, 1)[block.predictors.to(place)]
            log_probs = policy.lm_head(predicted).float().log_softmax(-1)
            chosen = log_probs.gather(-1, block.targets.to(place)[:, None]).squeeze(-1)
            ratio = (chosen - chosen.detach()).exp()
            advantages = stream([row.advantages for row in block.rows], place)
            per_token = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            per_token = per_token * stream([row.weights for row in block.rows], place)
            torch.autograd.backward(-per_token.sum())
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)

    return run, sum(weight.numel() for weight in weights)


def _rollouts(size: str, folder: str, device: str) -> str:
    requests = _requests(size)

    async def measured() -> tuple[int, float]:
        worker = await _started(size, folder, device)
        await worker.sample(requests)
        seconds = []
        for _ in range(TURNS):
            began = time.perf_counter()
            found = await worker.sample(requests)
            seconds.append(time.perf_counter() - began)
        await worker.close()
        return sum(rollout.num_tokens for rollout in found), median(seconds)

    tokens, seconds = asyncio.run(measured())
    return f"{tokens / seconds:.0f} tokens/s, {tokens} tokens of {len(requests)} rollouts"


def _offline(size: str, folder: str, device: str) -> str:
    from vllm import LLM, SamplingParams

    config = rollout_config(device)
    on_cpu = {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30), "enforce_eager": True}
    on_gpu = {"gpu_memory_utilization": config.gpu_memory_utilization}
    engine = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=_max_model_len(size),
        max_num_seqs=config.max_concurrent_rollouts,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **(on_cpu if device == "cpu" else on_gpu),
    )
    prompts = [{"prompt_token_ids": request.context.tolist()} for request in _requests(size)]
    params = SamplingParams(
        temperature=1.0, max_tokens=SIZES[size].tokens, logprobs=0, detokenize=False
    )
    engine.generate(prompts, params, use_tqdm=False)
    seconds, tokens = [], 0
    for _ in range(TURNS):
        began = time.perf_counter()
        found = engine.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        tokens = sum(len(output.outputs[0].token_ids) for output in found)
    return f"{tokens / median(seconds):.0f} tokens/s, {tokens} tokens of {len(prompts)} rollouts"


def _sync(size: str, folder: str, device: str) -> str:
    async def measured() -> str:
        learner = LocalLearner(_learner(folder, device), asyncio.Lock())
        worker = await _started(size, folder, device)
        engine = LocalRolloutWorker(worker)
        seconds = []
        for number in range(TURNS + 2):
            began = time.perf_counter()
            report = await sync_weights(learner, engine, number)
            seconds.append(time.perf_counter() - began)
        gap = await agreement(learner, await worker.sample(_requests(size)[:16]))
        await worker.close()
        phases = ", ".join(f"{name} {report.timings_s[name]:.3f}" for name in ("publish", "load"))
        return (
            f"{median(seconds[2:]):.3f} s for {report.ref.num_bytes / 1e6:.1f} MB through host "
            f"memory ({phases}); log-probs of {gap.num_tokens} tokens differ by mean "
            f"{gap.mean:.1e}, max {gap.max:.1e}, KL {gap.kl:.1e}"
        )

    return asyncio.run(measured())


def _direct_sync(size: str, folder: str, device: str) -> str:
    pipe, end = multiprocessing.Pipe()
    learner = multiprocessing.get_context("spawn").Process(
        target=_publish_on_request, args=(folder, device, end), daemon=True
    )
    learner.start()
    group = pipe.recv()  # before vLLM measures what is free

    async def measured() -> list[float]:
        worker = await _started(size, folder, device)
        seconds = []
        for version in range(1, TURNS + 3):
            pipe.send(version)
            began = time.perf_counter()
            await worker.receive_weights(WeightStream(group=group, first_rank=1, version=version))
            seconds.append(time.perf_counter() - began)
            num_bytes.append(pipe.recv())
        pipe.send(None)
        await worker.close()
        return seconds[2:]

    num_bytes: list[int] = []
    seconds = asyncio.run(measured())
    learner.join()
    return f"{median(seconds):.3f} s for {num_bytes[-1] / 1e6:.1f} MB from the device's own memory"


def _publish_on_request(folder: str, device: str, pipe: Connection) -> None:
    """The learner's process: tells its group, then sends every version that it is asked for."""
    learner, host = _learner(folder, device), "127.0.0.1"
    group = WeightGroup(host=host, port=learner.open_group(host), size=2, is_local=True)
    pipe.send(group)
    while (version := pipe.recv()) is not None:
        bundle = learner.publish(version, group)
        assert bundle is not None
        pipe.send(bundle.payload.nbytes)


SECTIONS: Mapping[str, Callable[[str, str, str], str]] = {
    "model": _model,  # first: the others load it
    "learner": _learner_against_bare,
    "rollout": _rollouts,
    "offline": _offline,
    "sync": _sync,
    "ipc": _direct_sync,
}
NEED_VLLM = ("rollout", "offline", "sync", "ipc")


async def _started(size: str, folder: str, device: str) -> RolloutWorker:
    worker = RolloutWorker(folder, rollout_config(device), _max_model_len(size))
    await worker.start()
    return worker


def rollout_config(device: str) -> RolloutConfig:
    return RolloutConfig(
        dtype="bfloat16",
        gpus_per_worker=0 if device == "cpu" else 1,
        gpu_memory_utilization=0.4,  # the learner lies on the same device in `sync` and `ipc`
        kv_cache_gib=0.1,
    )


def _max_model_len(size: str) -> int:
    return 64 + SIZES[size].tokens


def _requests(size: str) -> list[SampleRequest]:
    rng = np.random.default_rng(SEED)
    shape = SIZES[size]
    return [
        SampleRequest(
            group=index,
            index=0,
            context=_context(rng),
            guidance=np.zeros(0, np.int32),
            sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=shape.tokens),
            seed=index,
        )
        for index in range(shape.rollouts)
    ]


def _context(rng: np.random.Generator) -> Int32:
    return rng.integers(0, 256, 32).astype(np.int32)


def _learner(folder: str, device: str) -> LearnerRank:
    learner = LearnerRank(
        model=folder,
        config=LearnerConfig(
            backend="torch",
            dtype="bfloat16",
            learning_rate=1e-6,
            max_tokens_per_microbatch=MAX_TOKENS,
            gpus_per_rank=0 if device == "cpu" else 1,
        ),
        algorithm={"name": "grpo"},
        total_steps=100,
        temperature=1.0,
        rank=0,
        world_size=1,
        master="127.0.0.1:0",
        seed=SEED,
    )
    learner.start()
    return learner


def _seconds_of(run: Callable[[], object], device: str) -> float:
    """Median of the turns after one that allocates."""
    run()
    seconds = []
    for _ in range(TURNS):
        _settle(device)
        began = time.perf_counter()
        run()
        _settle(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
