"""Several data sets in a recipe: what may differ, what is refused, what check and metrics say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grpo.errors import UserError
from grpo.types import Prompt
from orchestration.check import checked
from orchestration.config import load_recipe, read_recipe
from orchestration.data_metrics import DataMetrics
from orchestration.plan import planned
from orchestration.prompt_order import PromptOrder
from orchestration.prompts import PromptSet
from orchestration.resume import require_same_data
from orchestration.run_inputs import held_out_prompts, planned_order
from orchestration.schema_export import recipe_schema
from orchestration.simulation.run import simulated
from orchestration.simulation.services import services
from orchestration.starter.data import write_datasets
from rollout_workers.tokenization import Tokenization
from tests.unit.small_project import MODEL, settings, written_project


def rows(path: Path, *found: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def a_mixture(folder: Path, *sets: Any, **data: Any) -> Path:
    """A recipe over `sums.jsonl` (4 rows) and `more/products.jsonl` (2 rows, other columns)."""
    rows(folder / "sums.jsonl", *[{"prompt": f"{i} +1", "answer": i + 1} for i in range(4)])
    rows(
        folder / "more" / "products.jsonl",
        *[{"question": f"{i} *2", "final": 2 * i, "level": i} for i in range(2)],
    )
    return written_project(folder, data={"train": list(sets) or SETS, **data})


PRODUCTS = {
    "source": "more/products.jsonl",
    "prompt_column": "question",
    "answer_column": "final",
    "domain": "products",
}
SETS = [{"source": "sums.jsonl", "weight": 3}, PRODUCTS]


def test_sets_have_their_own_columns_domains_and_shares(tmp_path: Path) -> None:
    recipe = load_recipe(a_mixture(tmp_path))
    order = planned_order(recipe, Tokenization(str(MODEL)))
    found = [order.at(group) for group in range(8)]
    assert [p.domain for p in found] == 2 * ["sums", "sums", "products", "sums"]
    assert {p.id for p in found if p.domain == "products"} == {
        "products.jsonl:1",
        "products.jsonl:2",
    }
    assert {p.reference for p in found if p.domain == "products"} == {"0", "2"}
    assert order.record.keys() == {"sums", "products"}


def test_a_name_is_in_prompt_ids_and_tells_two_files_of_one_name_apart(tmp_path: Path) -> None:
    rows(tmp_path / "b" / "sums.jsonl", {"prompt": "1 +1", "answer": 2})
    named = {"source": "b/sums.jsonl", "name": "other"}
    order = planned_order(
        load_recipe(a_mixture(tmp_path, "sums.jsonl", named)), Tokenization(str(MODEL))
    )
    assert order.at(1).id == "other:1"
    assert order.at(1).domain == "other"
    assert order.at(0).id.startswith("sums.jsonl:")


def test_a_curriculum_orders_each_set_by_itself(tmp_path: Path) -> None:
    rows(tmp_path / "hard.jsonl", *[{"prompt": f"{n} +1", "hard": n} for n in (3, 1, 2)])
    rows(tmp_path / "easy.jsonl", *[{"prompt": f"{n} -1", "hard": n} for n in (9, 8)])
    sets = [{"source": "hard.jsonl", "weight": 2}, "easy.jsonl"]
    path = a_mixture(tmp_path, *sets, shuffle=False, curriculum={"column": "hard"})
    order = planned_order(load_recipe(path), Tokenization(str(MODEL)))
    texts = [order.at(group).text for group in range(6)]
    assert texts == ["1 +1", "8 -1", "2 +1", "3 +1", "9 -1", "1 +1"]


def test_evaluation_takes_the_first_prompts_of_each_set(tmp_path: Path) -> None:
    path = a_mixture(tmp_path, evaluation=["sums.jsonl", PRODUCTS])
    recipe = load_recipe(path, ["evaluation.prompts=2"])
    found = held_out_prompts(recipe, Tokenization(str(MODEL)))
    assert [p.domain for p in found] == ["sums", "sums", "products", "products"]


def test_one_source_stays_one_line_in_the_run_folder_and_several_load_again(
    tmp_path: Path,
) -> None:
    single = load_recipe(written_project(tmp_path))
    assert single.model_dump(mode="json")["data"]["train"] == str(tmp_path / "train.jsonl")
    recipe = load_recipe(a_mixture(tmp_path))
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(dumped) == recipe


def test_overrides_reach_a_set(tmp_path: Path) -> None:
    recipe = load_recipe(a_mixture(tmp_path), ["data.train.1.weight=2"])
    assert [item.weight for item in recipe.data.train] == [3, 2]


def test_openrlhf_and_verl_name_several_files_in_their_ways(tmp_path: Path) -> None:
    a_mixture(tmp_path)
    changed = {"prompt_data": "sums.jsonl,train.jsonl", "prompt_data_probs": "0.25,0.75"}
    written = {**{k: v for k, v in settings().items() if k != "data"}, **changed}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(written))
    loaded = read_recipe(tmp_path / "r.yaml")
    assert [item.weight for item in loaded.recipe.data.train] == [0.25, 0.75]
    assert "prompt_data_probs is read as data.train.*.weight" in loaded.notices
    path = written_project(tmp_path, data={"train_files": ["sums.jsonl", "train.jsonl"]})
    assert [item.title for item in load_recipe(path).data.train] == ["sums", "train"]


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "weight of nothing": (
        [{"source": "sums.jsonl", "weight": 0}, PRODUCTS],
        "data.train.0.weight: found 0; expected greater than 0",
    ),
    "negative weight": (
        ["sums.jsonl", {**PRODUCTS, "weight": -1}],
        "data.train.1.weight: found -1; expected greater than 0",
    ),
    "unknown key": (
        [{"source": "sums.jsonl", "wieght": 2}, PRODUCTS],
        "data.train.0.wieght: unknown setting; did you mean data.train.0.weight?",
    ),
    "no source": ([{"weight": 2}], "data.train.0.source: missing"),
    "the same set twice": (
        ["sums.jsonl", "sums.jsonl"],
        "set 1 has the same source as set 0",
    ),
    "two sets of one name": (
        ["sums.jsonl", {**PRODUCTS, "name": "sums"}],
        "sets 0 and 1 are both called 'sums': give one a name",
    ),
    "two domains": (
        ["sums.jsonl", {**PRODUCTS, "domain_column": "level"}],
        "domain is 'products' for all prompts, and domain_column is 'level'",
    ),
    "a number": ([7], "data.train: found [7]; expected a file"),
    "a file that is not there": (
        ["sums.jsonl", {"source": "prodcts.jsonl"}],
        "data.train.1: found no 'prodcts.jsonl'; did you mean",
    ),
}


@pytest.mark.parametrize(("sets", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_its_set(tmp_path: Path, sets: list[Any], message: str) -> None:
    path = a_mixture(tmp_path, *sets)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert message in str(error.value)


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: found \[\]; expected a file"):
        load_recipe(written_project(tmp_path, data={"train": []}))


def test_check_tells_rows_shares_and_epochs_of_each_set(tmp_path: Path) -> None:
    """16 groups: 12 of 4 sums, 4 of 2 products."""
    recipe = load_recipe(a_mixture(tmp_path))
    found = [f.detail for f in checked(recipe, local=True) if f.name == "data.train"]
    assert found[0].startswith("sums: 4 prompts, the longest 7 tokens")
    assert found[0].endswith("75 % of the groups, 3 epochs in 2 steps")
    assert found[1].endswith("25 % of the groups, 2 epochs in 2 steps")
    rows_of_plan = [value for name, value in planned(recipe, local=True) if name == "data.train"]
    assert rows_of_plan[1] == f"products: {tmp_path / 'more' / 'products.jsonl'}"


def test_check_reports_an_empty_set_and_a_bad_row_by_their_files(tmp_path: Path) -> None:
    path = a_mixture(tmp_path, "sums.jsonl", "empty.jsonl", "bad.jsonl")
    rows(tmp_path / "empty.jsonl")
    rows(tmp_path / "bad.jsonl", {"promt": "1"})
    problems = [f.detail for f in checked(load_recipe(path), local=True) if not f.ok]
    assert "empty.jsonl: found no prompt" in problems[0]
    assert "bad.jsonl line 1: no column 'prompt'" in problems[1]


def test_check_refuses_a_domain_that_no_prompt_has(tmp_path: Path) -> None:
    path = a_mixture(tmp_path)
    srpo = ["algorithm=srpo", "algorithm.first_steps=1", "algorithm.num_generations=4"]

    def problems(domain: str) -> list[str]:
        recipe = load_recipe(path, [*srpo, f"algorithm.first_domains=[{domain}]"])
        return [f.detail for f in checked(recipe, local=True) if not f.ok]

    assert problems("sums") == []
    (problem,) = problems("sum")
    assert "the domain 'sum', which no prompt of data.train has; found: 'sums'" in problem


def test_a_resume_on_other_data_is_refused_with_what_changed(tmp_path: Path) -> None:
    recipe = load_recipe(a_mixture(tmp_path))
    saved = planned_order(recipe, Tokenization(str(MODEL))).record
    require_same_data(saved, json.loads(json.dumps(saved)))
    rows(tmp_path / "sums.jsonl", *[{"prompt": f"{i} +1"} for i in range(5)])
    now = planned_order(recipe, Tokenization(str(MODEL))).record
    with pytest.raises(UserError) as error:
        require_same_data(saved, now)
    assert "  sums: 4 prompts (fingerprint " in str(error.value)
    assert "when the run began, 5 prompts (" in str(error.value)
    assert "products" not in str(error.value)


def test_thousands_of_domains_have_twenty_names_and_the_others() -> None:
    prompts = tuple(
        Prompt(id=str(i), text="q", tokens=np.zeros(1, np.int32), domain=str(min(i // 2, 40)))
        for i in range(3000)  # 0 to 39 twice each, 40 for all others
    )
    metrics = DataMetrics(
        PromptOrder([PromptSet(name="many", prompts=prompts)], seed=0, shuffle=False)
    )
    assert metrics.num_domains == 41
    assert metrics.remark is not None
    assert "has 41 domains: the metrics name the 20 with the most prompts" in metrics.remark
    names = {metrics.name(prompt.domain) for prompt in prompts}
    assert len(names) == 21
    assert {"40", "others"} <= names


def test_a_simulated_srpo_finds_prompts_of_its_first_domain(tmp_path: Path) -> None:
    data = write_datasets(tmp_path, num_train=20, num_heldout=5)
    overrides = [f"data.train={data.train}", f"data.evaluation={data.heldout}"]
    recipe = load_recipe("srpo", ["steps=6", "algorithm.first_steps=3", *overrides])
    report = simulated(recipe, services(recipe), lambda step, now_s: None)
    assert report.trained_groups == 6 * 16


def test_the_schema_takes_one_source_a_list_and_sets() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_schema())
    for train in ("a.jsonl", ["a.jsonl"], SETS, PRODUCTS):
        assert validator.is_valid(settings(data={"train": train})), train
    for train in (7, [{"weight": 1}], [{"source": "a", "wieght": 1}]):
        assert not validator.is_valid(settings(data={"train": train})), train
