"""User functions behind a ScorerService: every failure stays a failure and hurts only its group."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.types import Group, Score, Span
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService
from tests.unit.scored_groups import whole, written_group


def _config(path: Path, source: str, **options: object) -> ScorerConfig:
    path.write_text(source)
    return ScorerConfig.model_validate({"name": "mine", "function": f"{path}:reward", **options})


async def _scored(config: ScorerConfig, *groups: Group) -> list[list[Score]]:
    service = ScorerService(config)
    await service.start()
    try:
        return await asyncio.gather(*(service.score(group, whole(group)) for group in groups))
    finally:
        await service.close()


def _values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def test_a_trl_function_gets_lists_and_the_columns_of_the_data_set(tmp_path: Path) -> None:
    source = """
def reward(prompts, completions, completion_ids, level, **kwargs):
    assert prompts == ["7 +5", "7 +5"] and set(kwargs) == {"note"}
    return [len(c) + len(i) + l for c, i, l in zip(completions, completion_ids, level)]
"""
    columns = {"prompt": "7 +5", "level": 100, "note": None}
    group = written_group(["ab", "abc"], columns=columns)
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), group))
    assert _values(scores) == [104, 106]
    assert scores[1].span == Span(rollout=1, start=0, end=3)


def test_messages_as_prompt_give_messages_as_completion(tmp_path: Path) -> None:
    source = """
async def reward(prompts, completions):
    assert prompts[0][0]["role"] == "user"
    return [float(c[0]["role"] == "assistant" and c[0]["content"] == "hi") for c in completions]
"""
    columns = {"prompt": [{"role": "user", "content": "greet"}]}
    group = written_group(["hi", "no"], columns=columns)
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), group))
    assert _values(scores) == [1.0, 0.0]


def test_a_prefix_and_a_step_reach_the_function_as_their_own_text(tmp_path: Path) -> None:
    source = "def reward(completions, **kwargs): return [int(c) for c in completions]"
    group = written_group(["123456"])
    spans = [Span(rollout=0, start=0, end=2), Span(rollout=0, start=2, end=5)]

    async def scored() -> list[Score]:
        service = ScorerService(_config(tmp_path / "r.py", source))
        await service.start()
        scores = await service.score(group, spans)
        await service.close()
        return scores

    assert _values(asyncio.run(scored())) == [12, 345]


def test_verl_and_openrlhf_functions_are_called_in_their_own_way(tmp_path: Path) -> None:
    verl = """
def reward(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth and data_source == "gsm8k")}
"""
    openrlhf = """
def reward(queries, prompts, labels):
    return {"rewards": [float(q == p + l) for q, p, l in zip(queries, prompts, labels)]}
"""
    group = written_group(["12", "13"], columns={"prompt": "7 +5", "data_source": "gsm8k"})
    for name, source in (("verl.py", verl), ("open.py", openrlhf)):
        (scores,) = asyncio.run(_scored(_config(tmp_path / name, source), group))
        assert _values(scores) == [1.0, 0.0]


def test_async_verl_calls_run_at_the_same_time(tmp_path: Path) -> None:
    source = """
import asyncio
together = []
async def reward(data_source, solution_str, ground_truth, extra_info=None):
    together.append(solution_str)
    for _ in range(1000):
        if len(together) == 2:
            return 1.0
        await asyncio.sleep(0.001)
    return 0.0
"""
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), written_group(["a", "b"])))
    assert _values(scores) == [1.0, 1.0]


def test_a_trl_function_that_asks_for_the_trainers_log_gets_one(tmp_path: Path) -> None:
    source = """
def reward(completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("mine", 1.0); log_extra("seen", completions)
    assert trainer_state is None and "log_metric" not in kwargs
    return [1.0]
"""
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), written_group(["a"])))
    assert _values(scores) == [1.0]


def test_what_others_are_asking_already_is_judged_once(tmp_path: Path) -> None:
    source = f"""
def reward(completions, **kwargs):
    open({str(tmp_path / "calls")!r}, "a").write(",".join(completions) + "\\n")
    return [float(c) for c in completions]
"""
    config = _config(tmp_path / "r.py", source, max_wait_ms=200, batch_size=64)
    groups = [written_group(["1", "2"]), written_group(["2", "3"]), written_group(["1", "2"])]
    found = asyncio.run(_scored(config, *groups))
    assert [_values(scores) for scores in found] == [[1, 2], [2, 3], [1, 2]]
    asked = (tmp_path / "calls").read_text().replace("\n", ",").strip(",").split(",")
    assert sorted(asked) == ["1", "2", "3"]


def test_who_waits_for_a_call_that_is_given_up_judges_for_itself(tmp_path: Path) -> None:
    source = """
def reward(completions, **kwargs):
    while "hang" in completions:
        pass
    return [float(c) for c in completions]
"""

    async def scored() -> list[Score]:
        service = ScorerService(_config(tmp_path / "r.py", source, batch_size=64, max_wait_ms=0))
        await service.start()
        both, one = written_group(["7", "hang"]), written_group(["7"])
        first = asyncio.create_task(service.score(both, whole(both)))
        await asyncio.wait([first], timeout=0.2)
        second = asyncio.create_task(service.score(one, whole(one)))
        await asyncio.wait([second], timeout=0.2)
        first.cancel()
        found = await second
        await service.close()
        return found

    assert _values(asyncio.run(scored())) == [7.0]


def test_none_is_not_applicable_and_no_failure(tmp_path: Path) -> None:
    source = "def reward(completions, **kwargs): return [None, 1]"
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), written_group(["a", "b"])))
    assert _values(scores) == [None, 1.0]
    assert [score.failure for score in scores] == [None, None]


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("[float('nan'), 1.0]", "returned nan"),
        ("[float('inf'), 1.0]", "returned inf"),
        ("[1.7e308, 1.0]", "returned 1.7e+308; expected a finite number between -1e+15 and 1e+15"),
        ("['0.5', 1.0]", "expected a number or None"),
        ("[1.0]", "1 values for 2 completions"),
        ("0.5", "expected a list of numbers"),
        ("[1 / 0, 1.0]", "ZeroDivisionError: division by zero (r.py:1)"),
        ("[int('x'), 1.0]", "ValueError"),
    ],
)
def test_what_is_no_number_is_a_failure_with_its_reason(
    tmp_path: Path, returned: str, reason: str
) -> None:
    source = f"def reward(completions, **kwargs): return {returned}"
    config = _config(tmp_path / "r.py", source)
    (scores,) = asyncio.run(_scored(config, written_group(["a", "b"])))
    assert scores[0].value is None
    assert reason in str(scores[0].failure)


def test_a_group_that_breaks_the_function_fails_alone(tmp_path: Path) -> None:
    source = """
def reward(completions, **kwargs):
    assert "bad" not in completions, "cannot read this"
    return [1.0 for _ in completions]
"""
    config = _config(tmp_path / "r.py", source, max_wait_ms=1000, batch_size=3)
    groups = [written_group([t], group=i) for i, t in enumerate(["good", "bad", "fine"])]
    good, bad, fine = asyncio.run(_scored(config, *groups))
    assert _values(good) == _values(fine) == [1.0]
    assert bad[0].value is None and "cannot read this" in str(bad[0].failure)


def test_a_hung_function_is_killed_and_the_next_group_is_scored(tmp_path: Path) -> None:
    source = """
import threading
def reward(completions, **kwargs):
    if "hang" in completions:
        threading.Event().wait()
    return [1.0 for _ in completions]
"""
    config = _config(tmp_path / "r.py", source, deadline_s=0.5, retries=0, max_wait_ms=0)
    hung, good = asyncio.run(
        _scored(config, written_group(["hang"]), written_group(["good"], group=1))
    )
    assert hung[0].value is None and "within 0.5 s" in str(hung[0].failure)
    assert _values(good) == [1.0]


def test_a_function_that_ends_its_process_is_a_failure(tmp_path: Path) -> None:
    source = "import os\ndef reward(completions, **kwargs): os._exit(3)"
    config = _config(tmp_path / "r.py", source)
    (scores,) = asyncio.run(_scored(config, written_group(["a"])))
    assert "died with exit status 3" in str(scores[0].failure)


def test_a_failed_call_is_tried_again(tmp_path: Path) -> None:
    source = f"""
import pathlib
def reward(completions, **kwargs):
    seen = pathlib.Path({str(tmp_path / "seen")!r})
    if not seen.exists():
        seen.touch()
        raise OSError("the judge is busy")
    return [1.0]
"""
    config = _config(tmp_path / "r.py", source, retries=1)
    (scores,) = asyncio.run(_scored(config, written_group(["a"])))
    assert _values(scores) == [1.0]


def test_concurrent_groups_share_one_call(tmp_path: Path) -> None:
    source = "def reward(completions, **kwargs): return [len(completions)] * len(completions)"
    config = _config(tmp_path / "r.py", source, batch_size=4, max_wait_ms=5000)
    groups = [written_group(["a", "b"], group=i) for i in range(4)]
    assert [_values(scores) for scores in asyncio.run(_scored(config, *groups))] == [[4, 4]] * 4


def test_a_cancelled_call_leaves_the_others_their_own_scores(tmp_path: Path) -> None:
    source = """
def reward(completions, **kwargs):
    while "hang" in completions:
        pass
    return [float(c) for c in completions]
"""

    async def scored() -> list[Score]:
        service = ScorerService(_config(tmp_path / "r.py", source, batch_size=1, max_wait_ms=0))
        await service.start()
        async with asyncio.TaskGroup() as tasks:
            hung = written_group(["hang"])
            cancelled = tasks.create_task(service.score(hung, whole(hung)))
            other = written_group(["7"], group=1)
            kept = tasks.create_task(service.score(other, whole(other)))
            await asyncio.wait([kept], timeout=0.3)
            assert not kept.done()
            cancelled.cancel()
        await service.close()
        return kept.result()

    assert _values(asyncio.run(scored())) == [7.0]


def test_printing_and_reading_streams_do_not_disturb_the_scores(tmp_path: Path) -> None:
    source = """
import os, sys
def reward(completions, **kwargs):
    print("hello"); os.write(1, b"raw"); sys.stdin.read()
    return [1.0]
"""
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), written_group(["a"])))
    assert _values(scores) == [1.0]


def test_the_function_runs_in_a_main_thread_of_its_own_process(tmp_path: Path) -> None:
    source = """
import os, signal, threading
def reward(completions, **kwargs):
    signal.setitimer(signal.ITIMER_REAL, 100)  # raises in any other thread
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert threading.current_thread() is threading.main_thread()
    return [os.getpid()]
"""
    (scores,) = asyncio.run(_scored(_config(tmp_path / "r.py", source), written_group(["a"])))
    assert scores[0].failure is None and scores[0].value != os.getpid()


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        ("def my_reward(completions): ...", "r.py:my_rewards", "did you mean 'my_reward'?"),
        ("def my_reward(completions): ...", "q.py:my_reward", "r.py?"),
        ("import absent_module", "r.py:reward", "No module named 'absent_module' (r.py:1)"),
        ("", "absent_module:reward", "reward module 'absent_module': not found"),
    ],
)
def test_a_function_that_cannot_be_found_is_the_users_error(
    tmp_path: Path, source: str, function: str, message: str
) -> None:
    (tmp_path / "r.py").write_text(source)
    place = f"{tmp_path}/{function}" if ".py" in function else function
    service = ScorerService(ScorerConfig(name="mine", function=place))
    with pytest.raises(UserError) as error:
        asyncio.run(service.start())
    assert message in str(error.value)


def test_a_rule_scores_spans_and_refuses_a_prompt_without_reference() -> None:
    config = ScorerConfig(name="answer", rule="numeric")
    (scores,) = asyncio.run(_scored(config, written_group(["answer: 12", "answer: 13"])))
    assert _values(scores) == [1.0, 0.0]
    (scores,) = asyncio.run(_scored(config, written_group(["answer: 12"], reference=None)))
    assert scores[0].failure == "prompt test:0 has no reference answer"
