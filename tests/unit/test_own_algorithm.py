"""Algorithms from a user's file: found, checked with one clear message, trained, explained."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest

from grpo import aggregation, gates, penalties, ratios, surrogates, token_weights
from grpo.algorithms import ALGORITHMS
from grpo.algorithms.user_file import found_algorithm
from grpo.combinations import combination_problems
from grpo.errors import UserError
from grpo.objective import Learnable, Objective, Penalty, ReferenceUpdate, Signal
from orchestration.cli import main
from orchestration.config import load_recipe
from orchestration.submit import local_files
from tests.unit.explained import EXAMPLES, column, explain, refused, toy, written
from tests.unit.family_cases import halves
from tests.unit.small_project import REPOSITORY, written_project

PAGE = (REPOSITORY / "docs" / "your-own-algorithm.md").read_text()
(SOURCE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def own_file(folder: Path, *changes: tuple[str, str], name: str = "forgiving.py") -> Path:
    """The page's file with some of its text replaced."""
    source = SOURCE
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    file = folder / name
    file.write_text(source)
    return file


def check(folder: Path, capsys: pytest.CaptureFixture[str], **settings: object) -> tuple[int, str]:
    """`covey check` of a small project with the page's algorithm."""
    algorithm = {"name": "forgiving.py:forgiving", "num_generations": 4, **settings}
    status = main(["check", str(written_project(folder, algorithm=algorithm)), "--local"])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def test_the_page_is_checked_described_and_explained(tmp_path: Path, capsys) -> None:
    file = own_file(tmp_path)
    assert check(tmp_path, capsys, cut_off_weight=0.25)[0] == 0
    assert main(["describe", f"{file}:forgiving", "--set", "cut_off_weight=0.1"]) == 0
    assert "forgiven(weight=0.1)" in capsys.readouterr().out
    group = toy()
    group["rollouts"][1]["finish_reason"] = "length"
    found = explain(capsys, f"{file}:forgiving", written(tmp_path, group))
    assert column(found, "token_weights") == [[1] * 3, [0.5] * 2, [1] * 4, [1]]
    ours = explain(capsys, f"{file}:forgiving", EXAMPLES / "toy.json", "epsilon=0.1")
    base = explain(capsys, "grpo", EXAMPLES / "toy.json", "epsilon=0.1", "epsilon_high=0.2")
    assert ours["loss"] == base["loss"], "without cut-off answers it is GRPO with that clip range"


def test_a_recipe_finds_it_beside_itself_and_keeps_where_it_is(tmp_path: Path) -> None:
    file = own_file(tmp_path)
    recipe = load_recipe(written_project(tmp_path, algorithm="forgiving.py:forgiving"))
    assert recipe.algorithm.name == f"{file}:forgiving"
    assert recipe.algorithm.settings.model_dump()["cut_off_weight"] == 0.5
    assert file in local_files(recipe), "submit uploads it"
    saved = recipe.algorithm.model_dump(mode="json")
    again = load_recipe(written_project(tmp_path, algorithm=saved))
    assert again.algorithm == recipe.algorithm


def test_a_learner_builds_its_objective_from_the_recipes_words(tmp_path: Path) -> None:
    from learner.rank import algorithm_objective

    recipe = load_recipe(written_project(tmp_path, algorithm=f"{own_file(tmp_path)}:forgiving"))
    objective = algorithm_objective(recipe.algorithm.model_dump(mode="json"))
    assert objective.surrogate.keywords["high"] == 0.4
    assert pickle.loads(pickle.dumps(objective.surrogate)).keywords["high"] == 0.4


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    file = own_file(tmp_path)
    first = found_algorithm(f"{file}:forgiving")
    assert found_algorithm(f"{file}:forgiving") is first
    own_file(tmp_path, ("Field(0.5,", "Field(0.75,"))
    os.utime(file, ns=(1, 1))
    assert found_algorithm(f"{file}:forgiving").config().model_dump()["cut_off_weight"] == 0.75


def test_files_of_one_name_in_two_folders_are_two_algorithms(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = found_algorithm(f"{own_file(tmp_path / 'a')}:forgiving")
    found_algorithm(f"{own_file(tmp_path / 'b')}:forgiving")
    point = first.pipeline(first.config(), outcomes={"a": 1.0}, max_completion_length=9)
    assert pickle.loads(pickle.dumps(point.token_weight)) is not None


MISTAKES = {
    "lambda": (
        ("partial(forgiven, weight=config.cut_off_weight)", "lambda group, state: []"),
        "pipeline.token_weight holds pipeline.<locals>.<lambda>, which can neither be printed",
    ),
    "arguments": (
        ("def forgiven(group, state, *, weight)", "def forgiven(group, *, weight)"),
        "forgiven cannot be called with the 2 arguments of this point",
    ),
    "unbound setting": (
        ("partial(forgiven, weight=config.cut_off_weight)", "forgiven"),
        "missing a required argument: 'weight'",
    ),
    "no function": (
        ("(partial(forgiven, weight=config.cut_off_weight),)", "(0.5,)"),
        "pipeline.token_weight holds 0.5; expected a function",
    ),
    "wrong half": (
        (
            "    return plain_objective(\n        config,",
            "    return dict(\n        config=config,",
        ),
        "objective(...) returned dict; expected Objective",
    ),
    "unknown setting": (("ge=0, le=1, description", "ge=2, description"), "cut_off_weight"),
    "setting without default": (("Field(0.5, ge", "Field(ge"), "cut_off_weight have no default"),
    "not a Config": (
        ("algorithm(config=Config,", "algorithm(config=dict,"),
        "expected a class that extends grpo.config.AlgorithmConfig",
    ),
    "syntax": (("def objective(config):", "def objective(config:"), "SyntaxError"),
    "import": (("import numpy as np", "import numpi as np"), "No module named 'numpi'"),
    "name": (("forgiving = algorithm", "forgivin = algorithm"), "did you mean 'forgivin'?"),
    "shape": (
        ("np.full(rollout.num_tokens, scale)", "np.full(rollout.num_tokens + 1, scale)"),
        "a dry run of one step failed",
    ),
    "not a number": (
        ("weight if rollout.is_truncated else 1.0", "float('nan')"),
        "token_weight is not finite",
    ),
    "raises": (
        ("    scales = [", "    scales = group.prompt.columns['budget'] and ["),
        "(forgiving.py, line 28): KeyError: 'budget'",
    ),
    "objective raises": (
        ("def objective(config):\n", "def objective(config):\n    {}['missing']\n"),
        "cannot be built (forgiving.py, line 46): KeyError: 'missing'",
    ),
    "combination": (
        ("config, surrogate=", "config, log_ratio=sequence_mean_log_ratio, surrogate="),
        "sequence_mean_log_ratio gives a whole answer one ratio",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("weight if rollout.is_truncated else 1.0", "float('nan')"),
            "token_weight is not finite",
        ),
        (("np.full(rollout.num_tokens, scale)", "'x'"), "failed on these groups"),
        (
            ("    scales = [", "    scales = group.prompt.columns['budget'] and ["),
            "failed on these groups (forgiving.py, line 28): KeyError: 'budget'",
        ),
        (
            ("def objective(config):\n", "def objective(config):\n    {}['missing']\n"),
            "cannot be built (forgiving.py, line 46): KeyError: 'missing'",
        ),
    ],
)
def test_explain_tells_a_mistake_in_the_file_by_its_line(
    tmp_path: Path, capsys, change: tuple[str, str], message: str
) -> None:
    file = own_file(tmp_path, change)
    assert message in refused(capsys, f"{file}:forgiving", EXAMPLES / "toy.json")


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found_before_launch(
    tmp_path: Path, capsys, change: tuple[str, str], message: str
) -> None:
    changes = [change]
    if "sequence_mean_log_ratio" in message:
        changes += [
            (
                "from grpo.surrogates",
                "from grpo.ratios import sequence_mean_log_ratio\nfrom grpo.surrogates",
            ),
            ("aggregation=aggregation.sequence_mean", "aggregation=aggregation.token_mean"),
        ]
    own_file(tmp_path, *changes)
    status, shown = check(
        tmp_path, capsys, **({"cut_off_weight": 0.5} if "ge=2" in change[1] else {})
    )
    assert status == 2
    assert message in shown
    assert "Traceback" not in shown


def test_a_missing_file_and_an_unknown_name_have_a_remedy(tmp_path: Path) -> None:
    own_file(tmp_path)
    with pytest.raises(UserError, match=r"forgivng.py: not found; did you mean .*forgiving.py"):
        found_algorithm(f"{tmp_path}/forgivng.py:forgiving")
    with pytest.raises(UserError, match=r"did you mean dapo.*or your own as my_file.py:name"):
        found_algorithm("dappo")


def _problems(objective: Objective, *, name: str = "grpo", **changes: object) -> str:
    from dataclasses import replace

    pipeline = replace(halves(name)[0], **changes)
    return "\n".join(combination_problems(pipeline, objective))


def test_each_senseless_combination_is_refused_with_its_reason() -> None:
    from dataclasses import replace
    from functools import partial

    _, plain = halves("grpo")
    assert _problems(plain) == ""
    for ratio in (ratios.sequence_mean_log_ratio, ratios.sequence_token_log_ratio):
        whole = replace(plain, log_ratio=ratio)
        assert _problems(whole) == ""
        assert "take sequence_mean" in _problems(whole, aggregation=aggregation.token_mean)
        traced = (partial(token_weights.trace_weights, decay=0.9),)
        assert "trace_weights" in _problems(whole, token_weight=traced)
    weight = partial(gates.linear_probability_weight, share=0.3)
    inside = replace(plain, log_ratio=partial(ratios.weighted_log_ratio, weight=weight))
    assert _problems(inside) == ""
    cispo = partial(surrogates.clipped_weight, low=None, high=5.0)
    assert "act twice" in _problems(replace(inside, surrogate=cispo))
    kl = Penalty(name="kl", coefficient=1.0, fn=penalties.k3)
    assert "add Signal.REFERENCE" in _problems(replace(plain, penalties=(kl,)))
    needs = frozenset({Signal.REFERENCE})
    assert _problems(replace(plain, penalties=(kl,), needs=needs)) == ""
    noise = Penalty(name="entropy", coefficient=-0.1, fn=penalties.entropy)
    assert "add Signal.ENTROPY" in _problems(replace(plain, penalties=(noise,)))
    needs = frozenset({Signal.ENTROPY})
    assert _problems(replace(plain, penalties=(noise,), needs=needs)) == ""
    moving = replace(plain, reference_update=ReferenceUpdate(every=1, decay=0.5))
    assert "reference" in _problems(moving)


def test_log_likelihood_allows_one_update_of_fresh_rollouts() -> None:
    pipeline, objective = halves("raft")

    def found(**step: object) -> list[str]:
        return list(combination_problems(pipeline, objective, **step))

    assert found() == []
    for step in ({"updates_per_step": 2}, {"epochs_per_step": 2}, {"is_replayed": True}):
        (problem,) = found(**step)
        assert "no ratio" in problem


def test_two_ways_to_tell_hopeless_groups_apart_are_refused() -> None:
    preferences, _ = halves("ws_grpo", outcomes={"a": 1.0, "p": 0.0}, preference_scorer="p")
    steps, objective = halves("sgpo", outcomes={"a": 1.0, "s": 0.0}, step_scorer="s")
    both = (*preferences.rewards, *steps.rewards)
    assert "keep one of them" in _problems(objective, rewards=both)


def test_measures_and_stages_need_both_halves() -> None:
    pipeline, objective = halves("thr")
    plain_pipeline, plain = halves("grpo")
    assert list(combination_problems(pipeline, objective)) == []
    assert "does not say how" in "".join(combination_problems(pipeline, plain))
    assert "never asks" in "".join(combination_problems(plain_pipeline, objective))
    staged, two_stages = halves("veripo")
    assert list(combination_problems(staged, two_stages)) == []
    assert "has none" in "".join(combination_problems(staged, plain))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_member_of_the_family_is_refused_with_its_defaults(name: str) -> None:
    assert list(combination_problems(*halves(name))) == []


def test_a_learnable_without_a_rate_is_refused() -> None:
    _, objective = halves("lambda_grpo_length")
    from dataclasses import replace

    scalar = objective.learnable
    assert isinstance(scalar, Learnable)
    broken = replace(objective, learnable=replace(scalar, learning_rate=-1.0))
    assert "finite rate" in _problems(broken)
