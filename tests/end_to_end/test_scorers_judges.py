"""Rules that need a deadline, the cache, and functions as other projects' pages show them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from grpo.types import Group, Score, Span
from reward_services.config import ScorerConfig
from reward_services.service import ScorerService, ScorerStatistics
from tests.unit.scored_groups import whole, written_group


async def _rounds(
    config: ScorerConfig, rounds: list[tuple[Group, list[Span]]]
) -> tuple[list[list[Score]], ScorerStatistics]:
    service = ScorerService(config)
    await service.start()
    try:
        scores = [await service.score(group, spans) for group, spans in rounds]
        return scores, service.statistics
    finally:
        await service.close()


def values(config: ScorerConfig, group: Group) -> list[float | None]:
    ((scores,), _) = asyncio.run(_rounds(config, [(group, whole(group))]))
    return [score.value for score in scores]


def test_mathematics_is_judged_off_the_main_thread_of_the_scorer() -> None:
    config = ScorerConfig(name="answer", rule="math")
    group = written_group(["so $\\frac{24}{2}$", "$13$"], reference="$12$")

    async def in_a_thread() -> list[float | None]:
        return await asyncio.to_thread(values, config, group)

    assert asyncio.run(in_a_thread()) == [1.0, 0.0]


def test_a_reference_that_is_no_mathematics_is_a_failure() -> None:
    config = ScorerConfig(name="answer", rule="math")
    group = written_group(["$1$"], reference="")
    ((scores,), _) = asyncio.run(_rounds(config, [(group, whole(group))]))
    assert scores[0].value is None
    assert "is no mathematics" in str(scores[0].failure)


def test_a_pattern_that_backtracks_for_ever_fails_only_the_text_that_makes_it() -> None:
    config = ScorerConfig(
        name="form", rule="regex", pattern=r"^(a+)+$", deadline_s=20, batch_size=40
    )  # half a second for each text
    hostile, fine = "a" * 40 + "b", "aaa"
    group = written_group([hostile, fine])
    ((scores,), _) = asyncio.run(_rounds(config, [(group, whole(group))]))
    assert [score.value for score in scores] == [None, 1.0]
    assert "longer than 0.5 s" in str(scores[0].failure)


COUNTING = """
calls = 0
def reward(completions, **kwargs):
    global calls
    calls += len(completions)
    return [float("nan") if c == "bad" else calls for c in completions]
"""


def _counting(path: Path, **options: object) -> ScorerConfig:
    path.write_text(COUNTING)
    settings = {"name": "mine", "function": f"{path}:reward", **options}
    return ScorerConfig.model_validate(settings)


def test_identical_texts_are_judged_once(tmp_path: Path) -> None:
    group = written_group(["a", "b", "a"])
    rounds = [(group, whole(group)), (group, whole(group))]
    scores, statistics = asyncio.run(_rounds(_counting(tmp_path / "r.py"), rounds))
    # Two distinct texts in the first round, none in the second.
    assert [[s.value for s in part] for part in scores] == [[2, 2, 2], [2, 2, 2]]
    assert [s.span.rollout for s in scores[1]] == [0, 1, 2]
    assert (statistics.num_scores, statistics.num_judged) == (6, 2)
    assert statistics.hit_rate == pytest.approx(4 / 6)


def test_another_prompt_reference_or_place_is_another_question(tmp_path: Path) -> None:
    group = written_group(["aa"])
    step, prefix = Span(rollout=0, start=1, end=2), Span(rollout=0, start=0, end=1)
    rounds = [
        (group, [step, prefix]),  # the same text "a"
        (written_group(["aa"], reference="13"), [prefix]),
        (written_group(["aa"], group=1), [prefix]),
    ]
    _, statistics = asyncio.run(_rounds(_counting(tmp_path / "r.py"), rounds))
    assert statistics.num_judged == 4


def test_a_failure_is_never_remembered(tmp_path: Path) -> None:
    group = written_group(["bad"])
    rounds = [(group, whole(group))] * 2
    _, statistics = asyncio.run(_rounds(_counting(tmp_path / "r.py"), rounds))
    assert (statistics.num_judged, statistics.num_failures) == (2, 2)


def test_the_cache_forgets_what_was_not_asked_for_longest(tmp_path: Path) -> None:
    a, b, c = (written_group([text]) for text in "abc")
    rounds = [(group, whole(group)) for group in (a, b, a, c, a, b)]
    config = _counting(tmp_path / "r.py", cache_size=2)
    _, statistics = asyncio.run(_rounds(config, rounds))
    # a, b judged; a known; c judged and b forgotten; a known; b judged again
    assert (statistics.num_judged, statistics.num_cached) == (4, 2)


def test_without_a_cache_every_text_is_judged(tmp_path: Path) -> None:
    group = written_group(["a", "a"])
    config = _counting(tmp_path / "r.py", cache_size=0)
    _, statistics = asyncio.run(_rounds(config, [(group, whole(group))]))
    assert statistics.num_judged == 2


def test_options_are_keyword_arguments_of_every_call(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def reward(completions, bonus, **kwargs): return [bonus] * len(completions)"
    )
    function = f"{tmp_path / 'r.py'}:reward"
    config = ScorerConfig(name="mine", function=function, options={"bonus": 0.25})
    assert values(config, written_group(["a"])) == [0.25]


# In the form that the projects' own pages show; nothing was adapted to covey.
TRL = '''
import re

def format_reward_func(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]
'''
TRL_TASKS = """
def math_reward_func(prompts, completions, task, **kwargs):
    rewards = []
    for prompt, completion, t in zip(prompts, completions, task):
        if t == "math":
            rewards.append(1.0 if "12" in completion else -1.0)
        else:
            rewards.append(None)
    return rewards
"""
OPENRLHF = """
import torch

def reward_func(queries, prompts, labels, **kwargs):
    # queries is prompts + responses
    # labels is answers
    rewards = torch.tensor([float(q.endswith(l)) for q, l in zip(queries, labels)])
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {"dummy_scores": rewards},
    }
"""
VERL = """
import re

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    solution = re.search("#### (\\\\-?[0-9\\\\.\\\\,]+)", solution_str)
    if solution is None:
        return 0
    final_answer = solution.group(0).split("#### ")[1].replace(",", "").replace("$", "")
    return 1.0 if final_answer == ground_truth else 0.1
"""
VERL_ASYNC = """
async def compute_score(data_source, solution_str, ground_truth, extra_info, scale=1.0, **kwargs):
    return {"score": scale * (solution_str == ground_truth), "acc": 1}
"""


@pytest.mark.parametrize(
    ("source", "name", "texts", "columns", "options", "expected"),
    [
        (
            TRL,
            "format_reward_func",
            ["<think>a</think><answer>b</answer>", "b"],
            {"prompt": [{"role": "user", "content": "7 +5"}]},
            {},
            [1.0, 0.0],
        ),
        (TRL_TASKS, "math_reward_func", ["12", "13"], {"task": "math"}, {}, [1.0, -1.0]),
        (TRL_TASKS, "math_reward_func", ["12", "13"], {"task": "coding"}, {}, [None, None]),
        (OPENRLHF, "reward_func", ["is 12", "is 13"], {}, {}, [1.0, 0.0]),
        (
            VERL,
            "compute_score",
            ["#### 12", "#### 13", "12"],
            {"data_source": "g"},
            {},
            [1, 0.1, 0],
        ),
        (VERL_ASYNC, "compute_score", ["12", "13"], {"extra_info": {}}, {"scale": 2}, [2, 0]),
    ],
)
def test_functions_of_other_projects_run_as_they_are(
    tmp_path: Path,
    source: str,
    name: str,
    texts: list[str],
    columns: dict[str, object],
    options: dict[str, object],
    expected: list[float | None],
) -> None:
    path = tmp_path / "reward.py"
    path.write_text(source)
    config = ScorerConfig.model_validate(
        {"name": "theirs", "function": f"{path}:{name}", "options": options}
    )
    group = written_group(texts, columns={"prompt": "7 +5", **columns})
    assert values(config, group) == expected
