"""The files that `covey explain` reads, its defaults, its messages, and what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from grpo.algorithms import ALGORITHMS
from grpo.errors import UserError
from grpo.pipeline import RewardedGroup
from grpo.types import Dropped, Origin, Score, Span
from orchestration.cli import main
from orchestration.group_file import Selection, groups_of, read_batch, read_groups
from orchestration.group_task import DroppedGroup, GroupTimes
from orchestration.records import dropped_record, trained_record
from orchestration.run_directory import encode_line
from orchestration.schema_export import group_schema
from tests.unit.explained import EXAMPLES, column, explain, refused, rollout, toy, written
from tests.unit.grpo_groups import random_groups
from tests.unit.small_project import written_project

TIMES = GroupTimes(admitted=1.0, generated=2.0, scored=3.0)


@pytest.mark.parametrize("value", [0.5, -1e308])
def test_what_is_no_log_probability_is_refused(tmp_path: Path, value: float) -> None:
    group = {"rollouts": [{"tokens": [1, 2], "log_probs": [-1, value]}], "outcomes": {"a": [1]}}
    (tmp_path / "g.json").write_text(json.dumps(group))
    with pytest.raises(UserError, match=r"log_probs\.1 is .*natural logarithm"):
        read_batch(tmp_path / "g.json")


def test_one_mistake_is_one_short_message(tmp_path: Path) -> None:
    rollout = {"tokens": list(range(2000)), "log_probs": [-1.0] * 1999}
    (tmp_path / "g.json").write_text(json.dumps({"rollouts": [rollout], "outcomes": {"a": [1]}}))
    with pytest.raises(UserError) as error:
        read_batch(tmp_path / "g.json")
    expected = "g.json: rollouts.0: log_probs has 1999 entries, but there are 2000 tokens"
    assert str(error.value) == expected
    (tmp_path / "g.json").write_text(json.dumps({"rollouts": "x" * 5000, "outcomes": {"a": [1]}}))
    with pytest.raises(UserError) as error:
        read_batch(tmp_path / "g.json")
    assert "5002 characters" in str(error.value) and len(str(error.value)) < 600


def test_a_file_that_is_no_text_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_bytes(b"\xaf\x00")
    with pytest.raises(UserError, match="no text"):
        read_batch(tmp_path / "g.json")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("example", ["toy.json", "steps.json"])
def test_every_algorithm_explains_the_examples_or_says_what_they_lack(
    capsys: pytest.CaptureFixture[str], name: str, example: str
) -> None:
    status = main(["explain", name, str(EXAMPLES / example), "--json"])
    shown = capsys.readouterr()
    if status == 2:
        assert example == "steps.json", shown.err
        assert re.search(r"give every rollout (hidden|entropy)", shown.err), shown.err
        return
    found = json.loads(shown.out)
    assert status == 0
    assert len(found["groups"]) == 1
    losses = [value for row in column(found, "token_loss") for value in row]
    assert sum(losses) == pytest.approx(found["loss"], abs=1e-12)
    assert None not in [value for row in column(found, "gradient") for value in row]


def test_a_group_a_list_a_batch_and_json_lines_say_the_same(tmp_path: Path, capsys) -> None:
    forms = [toy(), [toy()], {"groups": [toy()]}]
    files = [written(tmp_path, form, f"{i}.json") for i, form in enumerate(forms)]
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(toy()) + "\n\n")
    found = [explain(capsys, "grpo", file) for file in (*files, lines)]
    assert all(one == found[0] for one in found)


def test_what_is_left_out_has_sensible_defaults(tmp_path: Path) -> None:
    group = {
        "rollouts": [
            {"token_texts": ["a", "b", "a"], "log_probs": -0.5, "num_guidance_tokens": 1},
            {"token_texts": ["b"], "finish_reason": "length"},
        ]
    }
    (read,) = read_groups(written(tmp_path, group))
    first, second = read.rollouts
    assert first.text == "aba"
    assert first.tokens.tolist() == [0, 1, 0]
    assert second.tokens.tolist() == [1], "equal strings are equal tokens in the whole group"
    assert first.token_ends.tolist() == [1, 2, 3]
    assert first.log_probs.tolist() == [-0.5] * 3
    assert first.origins.tolist() == [Origin.GUIDANCE, Origin.POLICY, Origin.POLICY]
    assert first.versions.tolist() == [-1, 0, 0]
    assert second.log_probs.tolist() == [0.0]
    assert second.is_truncated


def test_log_probs_default_to_the_nearest_ones_that_are_given(tmp_path: Path, capsys) -> None:
    group = toy()
    for item in group["rollouts"]:
        del item["current_log_probs"], item["reference_log_probs"]
    found = explain(capsys, "grpo", written(tmp_path, group), "beta=1")
    assert {value for row in column(found, "log_ratios") for value in row} == {0.0}
    assert {v for p in column(found, "penalties") for v in p["kl"]} == {0.0}
    del group["rollouts"][0]["proximal_log_probs"]
    found = explain(capsys, "grpo", written(tmp_path, group))
    assert column(found, "gates")[0] == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollouts": [{"tokns": [1]}]}, "rollouts.0.tokns: unknown setting; did you mean"),
        ({"rollouts": [{}]}, "found neither tokens nor token_texts"),
        ({"rollouts": []}, "rollouts: found []"),
        ({"rollouts": [{"tokens": [1, 2], "log_probs": [0.5]}]}, "1 entries, but there are 2"),
        ({"outcomes": {"answer": [1]}}, "outcomes.answer has 1 values, but there are 4 rollouts"),
        (
            {"scores": [{"scorer": "s", "rollout": 7, "value": 1}]},
            "scores.0 is of rollout 7; there are 4",
        ),
        (
            {"scores": [{"scorer": "s", "rollout": 1, "end": 9, "value": 1}]},
            "scores.0 is of tokens [0, 9); rollout 1 has 2",
        ),
        ({"outcomes": {}}, "the groups have no score"),
        ({"state": {"length": 1}}, "the algorithm keeps none"),
    ],
)
def test_a_mistake_in_the_file_is_one_clear_message(
    tmp_path: Path, capsys, change: dict[str, object], message: str
) -> None:
    assert message in refused(capsys, "grpo", written(tmp_path, {**toy(), **change}))


def test_what_is_no_group_at_all_is_said_so(tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"rollouts": [\n')
    assert "broken.json, line 2: no JSON" in refused(capsys, "grpo", broken)
    assert "cannot be read" in refused(capsys, "grpo", tmp_path / "none.json")
    assert "found 3; expected a group" in refused(capsys, "grpo", written(tmp_path, [3]))
    assert "found no groups.jsonl" in refused(capsys, "grpo", tmp_path)
    assert "did you mean grpo?" in refused(capsys, "grpoo", broken)


def test_a_failed_score_drops_the_group_with_its_cause(tmp_path: Path, capsys) -> None:
    failed = {"scorer": "extra", "rollout": 1, "failure": "out of time"}
    found = explain(capsys, "grpo", written(tmp_path, toy(scores=[failed])))
    assert found["groups"][0]["dropped"] == {
        "reason": "failed_score",
        "detail": "scorer 'extra', rollout 1: out of time",
        "is_planned": False,
    }


def test_a_prompt_that_would_be_skipped_says_why(tmp_path: Path, capsys) -> None:
    groups = [toy(prompt={"id": "easy"}, rewards=[1, 1, 1, 1]), toy(prompt={"id": "hard"})]
    first = explain(capsys, "srpo", written(tmp_path, groups))
    assert first["next_state"]["all_right"] == {"easy": True, "hard": False}
    later = written(tmp_path, {"groups": groups, "state": first["next_state"]})
    easy, hard = explain(capsys, "srpo", later)["groups"]
    assert easy["dropped"]["reason"] == "solved_last_time"
    assert easy["dropped"]["is_planned"]
    assert hard["kept"]


def test_a_run_folder_is_read_by_step_and_group(tmp_path: Path, capsys) -> None:
    groups = random_groups(3, num_groups=4, num_generations=4)
    lines = []
    for number, group in enumerate(groups[:3]):
        rewards = np.array(group.outcomes("answer"), float)[:, None]
        rewarded = RewardedGroup(group=group, components=rewards)
        record = trained_record(rewarded, [], terms=["answer"], times=TIMES, trained=4.0)
        lines.append(encode_line(1 + number // 2, record))
    dropped = Dropped(group=3, prompt="p3", reason="constant_outcome")
    fallen = DroppedGroup(group=groups[3], dropped=dropped, times=TIMES)
    lines.append(encode_line(2, dropped_record(fallen)))
    (tmp_path / "groups.jsonl").write_bytes(b"".join(lines))

    def ids(*words: str) -> list[int]:
        assert main(["explain", "grpo", str(tmp_path), "--json", *words]) == 0
        return [group["group"] for group in json.loads(capsys.readouterr().out)["groups"]]

    assert ids() == [2]
    assert ids("--step", "1") == [0, 1]
    assert ids("--group", "1") == [1]
    assert ids("--group", "3") == [3], "a dropped group may be asked for"
    assert main(["explain", "grpo", str(tmp_path), "--step", "9"]) == 2
    assert "found no group of step 9; it has 1 to 2" in capsys.readouterr().err
    assert main(["explain", "grpo", str(tmp_path), "--step", "1", "--group", "2"]) == 2
    assert "found no group 2; it has 0 to 1" in capsys.readouterr().err


def test_a_record_of_a_run_comes_back_as_the_group_it_was(tmp_path: Path) -> None:
    group = random_groups(5, num_groups=1, num_generations=3)[0]
    judged = Score(scorer="steps", span=Span(rollout=1, start=0, end=1), value=0.25)
    lost = Score(scorer="late", span=Span(rollout=0, start=0, end=1), value=None, failure="slow")
    group = type(group)(
        id=group.id,
        prompt=group.prompt,
        rollouts=group.rollouts,
        scores=(*group.scores, judged, lost),
    )
    fallen = DroppedGroup(
        group=group, dropped=Dropped(group=0, prompt="p0", reason="failed_score"), times=TIMES
    )
    (tmp_path / "groups.jsonl").write_bytes(encode_line(1, dropped_record(fallen)))
    (read,) = groups_of(read_batch(tmp_path, Selection(groups=(group.id,))))
    assert read.prompt.tokens.tolist() == group.prompt.tokens.tolist()
    assert judged in read.scores
    assert [s.failure for s in read.scores if s.scorer == "late"] == ["slow"]
    assert read.outcomes("answer") == pytest.approx(group.outcomes("answer"), rel=1e-6)
    for ours, theirs in zip(read.rollouts, group.rollouts, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-6)
        assert ours.finish_reason is theirs.finish_reason
        assert ours.text == theirs.text


def test_a_recipe_brings_its_weights_and_its_token_budget(tmp_path: Path, capsys) -> None:
    recipe = written_project(
        tmp_path,
        algorithm={"name": "dr_grpo"},
        scorers=[{"name": "answer", "rule": "numeric", "weight": 3}],
    )
    file = written(tmp_path, toy())
    ours = explain(capsys, str(recipe), file)
    assert ours["weights"] == {"answer": 3}
    assert column(ours, "coefficients")[3] == [1 / (4 * 32)]
    alone = explain(capsys, "dr_grpo", file, weight="answer=3", max_completion_length=32)
    assert alone == ours


def test_combinations_that_make_no_sense_are_refused_here_too(tmp_path: Path, capsys) -> None:
    file = written(tmp_path, [toy(), toy()])
    assert main(["explain", "raft", str(file), "--updates", "2"]) == 2
    assert "log_likelihood has no ratio" in capsys.readouterr().err


def test_the_group_schema_accepts_what_explain_reads() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(group_schema())
    for value in (toy(), [toy(), toy()], {"groups": [toy()], "learnable": 0.5}):
        check.validate(value)
    for example in EXAMPLES.glob("*.json"):
        check.validate(json.loads(example.read_text()))
    assert not check.is_valid({"rollouts": [rollout([1], log_prob=[0])]})
    assert not check.is_valid({"rollouts": []})


def test_schema_group_is_printed(capsys) -> None:
    assert main(["schema", "group"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "covey group"


def test_the_terminal_form_has_every_token_and_no_colour_in_a_pipe(capsys) -> None:
    assert main(["explain", "grpo", str(EXAMPLES / "toy.json"), "--tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "kept, 4 of 4 rollouts" in shown
    assert "7+5 =12 ." in shown
    assert "2 more" in shown
    assert re.search(r"loss +-?0\.\d+", shown)


def test_a_terminal_gets_tokens_coloured_by_credit_unless_it_wants_none(monkeypatch) -> None:
    from io import StringIO

    from rich.console import Console

    from orchestration.chosen_algorithm import chosen_algorithm
    from orchestration.explain.as_text import print_explanation
    from orchestration.explain.composition import composed
    from orchestration.explain.explanation import explained

    batch = read_batch(EXAMPLES / "toy.json")
    pipeline, objective, _ = composed(chosen_algorithm("grpo", []), batch)
    found = explained(pipeline, objective, batch)

    def shown(**environment: str) -> str:
        file = StringIO()
        console = Console(
            file=file,
            force_terminal=True,
            width=120,
            color_system="truecolor",
            _environ=environment,
        )
        print_explanation(found, console=console, max_tokens=0)
        return file.getvalue()

    coloured = shown(TERM="xterm-256color")
    (first,) = re.findall(r"\x1b\[[^m]*48;2;(\d+);(\d+);0m7\+5", coloured)[:1]
    assert int(first[1]) > int(first[0]) == 0, "a good answer's token is green"
    assert "48;2" not in shown(TERM="xterm-256color", NO_COLOR="1")


def test_terms_of_one_scorer_keep_their_own_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = explain(capsys, "ws_grpo", EXAMPLES / "steps.json", "preference_scorer=steps")
    (first, *_) = found["groups"][0]["rollouts"]
    assert set(first["rewards"]) == {"finished_outcome", "step_preference", "steps_out_of_range"}
    assert sum(first["rewards"].values()) == pytest.approx(first["reward"])
    assert {f"rewards/{name}/mean" for name in first["rewards"]} <= found["metrics"].keys()


def test_the_steps_of_the_example_are_those_that_training_cuts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("step_scorer=steps", "min_step_chars=1")
    found = explain(capsys, "sgpo", EXAMPLES / "steps.json", *settings)
    assert found["groups"][0]["unscored"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weight", "answerr=2"], "no group has a score of 'answerr'; they have answer"),
        (["--set", "name=dapo"], "the algorithm is grpo; name another in its place"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["explain", "grpo", str(EXAMPLES / "toy.json"), *options]) == 2
    assert message in capsys.readouterr().err
