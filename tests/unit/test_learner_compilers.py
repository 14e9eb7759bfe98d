"""When the output layer is compiled, and what is said where it cannot be."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from grpo.errors import UserError
from learner.compilers import fuses_log_probs
from learner.config import LearnerConfig
from orchestration.check import checked
from orchestration.recipe import Recipe
from tests.unit.small_project import settings


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder where programs are looked for; Triton is there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    triton = ModuleType("triton")
    triton.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", triton)
    return tmp_path


def install(tools: Path, name: str) -> None:
    program = tools / name
    program.touch()
    program.chmod(0o755)


def asked(fused: bool | None, *, gpus: int = 0) -> bool:
    return fuses_log_probs(
        LearnerConfig.model_validate({"fused_log_probs": fused, "gpus_per_rank": gpus})
    )


def test_left_out_it_means_gpus_that_can(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked(None, gpus=1)  # no C compiler
    install(tools, "gcc")
    install(tools, "g++")
    assert asked(None, gpus=1)
    assert not asked(None, gpus=0)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not asked(None, gpus=1)


def test_false_is_never_and_true_is_on_cpus_too(tools: Path) -> None:
    install(tools, "gcc")
    install(tools, "g++")
    assert not asked(False, gpus=1)
    assert asked(True, gpus=0)


def test_true_without_a_compiler_is_refused_with_the_remedy(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"is true, but there is no C\+\+ compiler .*install g\+\+"):
        asked(True)
    with pytest.raises(UserError, match=r"no C compiler for Triton .*install gcc"):
        asked(True, gpus=1)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="triton is not installed: pip install triton"):
        asked(True, gpus=1)


def test_the_compilers_that_the_environment_names_count(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tools, "mine")
    monkeypatch.setenv("CC", "mine")
    monkeypatch.setenv("CXX", "mine")
    assert asked(True)
    assert asked(True, gpus=1)


def test_check_says_whether_the_output_layer_is_compiled(tools: Path) -> None:
    for is_there in (False, True):
        if is_there:
            install(tools, "g++")
        recipe = Recipe.model_validate(
            settings(learner={"backend": "torch", "fused_log_probs": True})
        )
        found = {finding.name: finding for finding in checked(recipe, local=True)}
        assert found["output layer"].ok == is_there
