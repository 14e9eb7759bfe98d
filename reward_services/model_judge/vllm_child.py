"""The process that holds a judge model in vLLM; the one file outside rollout_workers/ that may.

A judge is no rollout worker: nobody swaps its weights, and a deadline has to be able to kill it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from grpo.errors import UserError
from reward_services.function_child import Functions, serve_all
from reward_services.model_judge.chat import question_tokens
from reward_services.model_judge.local_model import REPLIES
from reward_services.model_judge.questions import Question, Reply, reply_schema, too_long

CPU_BLOCK_TOKENS = 32  # unit of prefix sharing; vLLM's 128 on the CPU is longer than many questions
CPU_STEP_TOKENS = 4096  # prompt tokens of one engine step; more questions wait for the next


class VllmJudge:
    """Owns the engine; answers a list of questions at a time."""

    def __init__(self, path: str, options: dict[str, object]) -> None:
        self._max_model_len = int(str(options["max_model_len"]))
        self._max_reply_tokens = int(str(options["max_reply_tokens"]))
        on_gpu = torch.cuda.is_available()  # of a Ray actor: a GPU that was set aside for it
        if not on_gpu:
            # vLLM compiles a small kernel even in eager mode: seconds at the first token.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        try:
            self._llm = LLM(**self._settings(path, options, on_gpu=on_gpu))
        except (OSError, ValueError) as error:
            raise UserError(f"judge {path} cannot be loaded by vLLM: {error}") from error

    def _settings(
        self, path: str, options: dict[str, object], *, on_gpu: bool
    ) -> dict[str, object]:
        parallel = options["tensor_parallel_size"]
        return dict(
            model=path,
            dtype=options["dtype"],
            max_model_len=self._max_model_len,
            max_num_seqs=options["max_concurrent"],
            enforce_eager=not on_gpu,
            enable_prefix_caching=True,
            generation_config="vllm",  # no sampling defaults from the model's folder
            # "auto" looks for grammar libraries one by one; this one serves JSON schemas.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            tensor_parallel_size=parallel,
            distributed_executor_backend="uni" if parallel == 1 else "mp",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **(
                {"gpu_memory_utilization": options["gpu_memory_utilization"]}
                if on_gpu
                else _on_cpu(options, self._max_model_len)
            ),
        )

    def replies(self, request: tuple[Sequence[Question], bool]) -> list[Reply]:
        """One reply each; a question that is too long has a failure instead."""
        questions, is_retry = request
        tokenizer = self._llm.get_tokenizer()
        prompts = [question_tokens(tokenizer, question.messages) for question in questions]
        room = self._max_model_len - self._max_reply_tokens
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) <= room]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompts[place]) for place in fitting],
            [self._params(questions[place], is_retry=is_retry) for place in fitting],
            use_tqdm=False,
        )
        texts = {
            place: output.outputs[0].text for place, output in zip(fitting, outputs, strict=True)
        }
        return [
            Reply(text=texts[place])
            if place in texts
            else Reply(text=None, failure=too_long(len(prompt), room))
            for place, prompt in enumerate(prompts)
        ]

    def _params(self, question: Question, *, is_retry: bool) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if is_retry else 0.0,
            max_tokens=self._max_reply_tokens,
            structured_outputs=StructuredOutputsParams(json=reply_schema(question.num_steps)),
        )


def _on_cpu(options: dict[str, object], max_model_len: int) -> dict[str, object]:
    return {
        "kv_cache_memory_bytes": int(float(str(options["kv_cache_gib"])) * 2**30),
        "block_size": CPU_BLOCK_TOKENS,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, CPU_STEP_TOKENS),
    }


def main(path: str, options: str) -> None:
    """Load the model, then answer until the input ends."""

    def load() -> Functions:
        return {REPLIES: VllmJudge(path, json.loads(options)).replies}

    serve_all(load)


if __name__ == "__main__":
    main(*sys.argv[1:])
