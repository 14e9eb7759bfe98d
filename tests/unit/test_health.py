"""Signs that a run has stopped learning, and the alarm that ends it; healthy runs show none."""

from __future__ import annotations

import pytest

from grpo.errors import Fatal
from grpo.types import Score
from orchestration.alarms import LearningAlarm
from orchestration.config import Recipe, load_recipe
from orchestration.health import LONG_ENOUGH, RECENT_STEPS, Metrics, signs_of_trouble
from tests.fakes import FakeScorer
from tests.unit.driver_setting import Setting, a_schedule, root
from tests.unit.small_project import written_project

HEALTHY: Metrics = {
    "loss": 0.01,
    "grad_norm": 0.5,
    "reward": 0.4,
    "frac_reward_zero_std": 0.5,
    "completions/clipped_ratio": 0.2,
    "dropped": 1.0,
    "log_prob_gap": 1e-6,
    "perf/throughput": 1000.0,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("project")
    return load_recipe(written_project(folder, num_prompts_per_step=8), [])


def signs(recipe: Recipe, *, steps: int = LONG_ENOUGH, **changed: float | None) -> list[str]:
    """Of a run whose last steps differ from a healthy one; `__` stands for a slash."""
    recent = {**HEALTHY, **{name.replace("__", "/"): value for name, value in changed.items()}}
    healthy = [HEALTHY] * (steps - min(steps, RECENT_STEPS))
    return list(signs_of_trouble([*healthy, *[recent] * min(steps, RECENT_STEPS)], recipe))


def test_a_healthy_run_shows_no_sign(recipe: Recipe) -> None:
    assert signs(recipe) == []
    assert list(signs_of_trouble([], recipe)) == []


@pytest.mark.parametrize(
    ("changed", "beginning", "remedy"),
    [
        ({"frac_reward_zero_std": 1.0}, "learning has stopped", "sampling.temperature"),
        (
            {"completions__clipped_ratio": 1.0},
            "every completion of the last 10 steps was cut off",
            "sampling.max_completion_length",
        ),
        ({"dropped": 30.0, "dropped__failed_score": 30.0}, "scores fail", "groups.jsonl"),
        ({"dropped": 100.0}, "1000 of the last 1080 groups were dropped", "groups.jsonl"),
        ({"log_prob_gap": 9e-4}, "rollout engine and learner differ by 9.0e-04", "selftest"),
        ({"perf__throughput": 200.0}, "throughput has collapsed: 200 tokens/s", "timing_s"),
        ({"grad_norm": None}, "grad_norm of the last step is no finite number", "covey replay"),
    ],
)
def test_each_sign_comes_alone_and_with_its_remedy(
    recipe: Recipe, changed: dict[str, float | None], beginning: str, remedy: str
) -> None:
    (sign,) = signs(recipe, **changed)
    assert sign.startswith(beginning)
    assert remedy in sign


def test_a_few_steps_alone_are_no_sign(recipe: Recipe) -> None:
    assert signs(recipe, steps=RECENT_STEPS - 1, frac_reward_zero_std=1.0) == []
    assert signs(recipe, steps=LONG_ENOUGH - 1, perf__throughput=200.0) == []


class Alike(FakeScorer):
    """The same score for all answers of a group, but in every third step of three groups."""

    third_teaches = False

    async def score(self, group, spans):  # type: ignore[no-untyped-def]
        teaches = self.third_teaches and group.id // 3 % 3 == 2
        return [
            Score(scorer=self.name, span=span, value=float(teaches and span.rollout == 0))
            for span in spans
        ]


def test_a_run_whose_steps_teach_nothing_ends_after_the_allowed_number_of_them() -> None:
    setting = Setting(a_schedule(steps=9, max_steps_without_signal=3), scorer=Alike())
    with pytest.raises(ExceptionGroup) as raised:
        setting.run()
    error = root(raised.value)
    assert isinstance(error, Fatal)
    assert "the last 3 steps taught nothing" in str(error)
    assert "alarms.steps_without_signal is 3" in str(error)
    assert "too easy or too hard" in str(error)
    assert [step.step for step in setting.journal.steps] == [1, 2, 3]
    assert setting.driver.is_between_steps  # so that what was learnt before can be saved


@pytest.mark.parametrize(("allowed", "finishes"), [(3, True), (2, False)])
def test_one_step_that_teaches_begins_the_count_anew(allowed: int, finishes: bool) -> None:
    scorer = Alike()
    scorer.third_teaches = True
    setting = Setting(a_schedule(steps=9, max_steps_without_signal=allowed), scorer=scorer)
    if finishes:
        assert setting.run()
    else:
        with pytest.raises(ExceptionGroup):
            setting.run()
    constant = [s.metrics["frac_reward_zero_std"] == 1.0 for s in setting.journal.steps]
    assert constant == ([True, True, False] * 3)[: len(constant)]


def test_the_alarm_names_the_budget_where_every_completion_was_cut_off() -> None:
    alarm = LearningAlarm(max_steps=1)
    setting = Setting(a_schedule(steps=1), scorer=Alike())
    setting.run()
    (step,) = setting.journal.steps
    alarm.observe(step.built, {**step.metrics, "completions/clipped_ratio": 1.0})
    with pytest.raises(Fatal, match=r"sampling\.max_completion_length"):
        alarm.require_signal()
