"""Generated programs against unit tests: partial scores, and verdicts that no program can forge."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.types import Score
from reward_services.config import ScorerConfig
from reward_services.sandbox import Sandbox
from reward_services.sandbox_config import SandboxConfig
from reward_services.service import ScorerService
from reward_services.unit_tests import TestResult, program_in, read_tests, results
from tests.unit.scored_groups import whole, written_group

CONFIG = SandboxConfig(time_s=1, memory_mb=256)
MISSING = Sandbox(CONFIG).missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no isolation on this host: {MISSING}")
SQUARE = "def square(x):\n    return x * x\n"


def outcomes(source: str, tests: object) -> list[str]:
    return [result.outcome for result in found(source, tests)]


def found(source: str, tests: object) -> list[TestResult]:
    return results(Sandbox(CONFIG), CONFIG, source, read_tests(tests), budget_s=60)


def test_what_is_printed_is_compared_line_by_line() -> None:
    tests = {"inputs": ["3\n", "4\n", "x\n"], "outputs": ["9\n", "17", "0"]}
    assert outcomes("print(int(input()) ** 2, ' ')\nprint()", tests) == [
        "passed",
        "wrong",
        "failed",
    ]


def test_each_statement_is_a_test() -> None:
    tests = [
        "assert square(2) == 4",
        "assert square(3) == 10",
        "import math\nassert square(0) == 0",
    ]
    assert outcomes(SQUARE, tests) == ["passed", "failed", "passed"]


def test_a_check_of_a_candidate_is_a_test() -> None:
    test = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-1) == 1\n"
    assert outcomes(SQUARE, test + "check(square)") == ["passed"]
    assert outcomes("def square(x): return abs(x)", test + "check(square)") == ["failed"]


def test_values_of_every_literal_type_and_exceptions_arrive() -> None:
    source = (
        "def f(x):\n    if x == 0: raise ValueError('zero')\n"
        "    return (x, {1: [2.5, None]}, {'a'})"
    )
    tests = [
        "assert f('b') == ('b', {1: [2.5, None]}, {'a'})",
        "try:\n    f(0)\nexcept ValueError:\n    pass\nelse:\n    assert False",
        "assert f(x=2)[0] == 2",
    ]
    assert outcomes(source, tests) == ["passed"] * 3


def test_a_test_that_hangs_or_ends_the_program_costs_only_itself() -> None:
    source = (
        "import os\ndef square(x):\n    while x == 3: pass\n    if x == 5: os._exit(0)\n"
        "    return x * x"
    )
    tests = [f"assert square({x}) == {x * x}" for x in (2, 3, 4, 5, 6)]
    assert outcomes(source, tests) == ["passed", "time", "passed", "failed", "passed"]


# All of these would have to know or reach the expected value, and it is not where they are.
FORGERIES = {
    "equal to everything": "class Any:\n    def __eq__(self, other): return True\n"
    "def square(x): return Any()",
    "a repr that is an expression": "class Any:\n"
    "    def __repr__(self): return '__import__(\"os\")'\n"
    "def square(x): return Any()",
    "an int equal to everything": "class Any(int):\n    def __eq__(self, other): return True\n"
    "def square(x): return Any()",
    "ends well at once": "import os\nos._exit(0)",
    "says it passed": "import json\nprint(json.dumps({'outcome': 'passed', 'detail': ''}))",
    "says so on every open file": "import json, os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, json.dumps({'outcome': 'passed', 'detail': ''}).encode() + b'\\n')\n"
    "    except OSError: pass\nos._exit(0)",
    "answers before it is asked": "import json, os\n"
    "os.write(3, (json.dumps({'value': 'True'}) + '\\n').encode() * 9)\n"
    "def square(x): return True",
    "replaces the builtins": "import builtins\nbuiltins.AssertionError = ValueError\n"
    "builtins.repr = lambda x: 'True'\ndef square(x): return 48",
    "raises what the tests raise": "def square(x): raise AssertionError('passed')",
    "leaves as if all were well": "def square(x): raise SystemExit(0)",
    "swaps the loader's files": "import os, sys\n"
    "for name in ('/program/tests.json', '/program/x'):\n"
    "    try: open(name, 'w').write('[]')\n    except OSError: pass\n",
    "looks for the tests": "import glob\nfiles = glob.glob('/program/*') + glob.glob('/tmp/*')\n"
    "text = ''.join(open(f).read() for f in files)\n"
    "import re\nfound = re.findall(r'== (\\d+)', text)\n"
    "def square(x): return int(found[0]) if found else None",
    "looks for the tests in memory": "import gc\n"
    "found = [o for o in gc.get_objects() if isinstance(o, str) and 'assert square' in o]\n"
    "def square(x): return 49 if found else None",
    "changes the arguments": "def square(x):\n    x += 1\n    return x",
    "endless answer": "def square(x): return 'x' * 10**7",
    "an answer nested too deep": "class Deep:\n    def __repr__(self): return '[' * 10**5\n"
    "def square(x): return Deep()",
    "an expensive answer": "class Big:\n    def __repr__(self): return '9' * 10**6\n"
    "def square(x): return Big()",
    "names a builtin of the tests": "def int(x): return 49\ndef len(x): return 49\n",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_forges_a_verdict(name: str) -> None:
    (result,) = found(FORGERIES[name], ["assert square(7) == int('49')"])
    assert result.outcome != "passed", result
    assert result.detail


def test_a_printed_verdict_is_only_a_wrong_answer() -> None:
    test = [{"input": "", "output": "42"}]
    for source in (
        "print('passed')",
        'print(\'{"outcome": "passed"}\')',
        "import sys\nsys.exit(0)",
        "print(42)\nraise SystemExit(1)",
    ):
        assert outcomes(source, test) != ["passed"]


def test_the_last_fenced_block_is_the_program() -> None:
    assert program_in("so\n```python\nx = 1\n```\nor\n```\nx = 2\n```\nis it") == "x = 2"
    assert program_in("```python\ncut = off") == "cut = off"
    assert program_in("x = 3") == "x = 3"


@pytest.mark.parametrize("column", [None, [], 7, [{"input": "1"}], [["assert True"]]])
def test_what_is_no_test_is_the_data_sets_mistake(column: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_tests(column)


def scored(config: ScorerConfig, texts: list[str], tests: object) -> list[Score]:
    async def run() -> list[Score]:
        service = ScorerService(config)
        await service.start()
        group = written_group(texts, columns={"prompt": "square it", "tests": tests})
        try:
            return await service.score(group, whole(group))
        finally:
            await service.close()

    return asyncio.run(run())


def test_the_score_is_the_share_of_passed_tests() -> None:
    tests = ["assert square(2) == 4", "assert square(3) == 9"]
    texts = [f"```python\n{SQUARE}```", "def square(x): return x + 2", "no program"]
    config = ScorerConfig(name="tests", code=CONFIG)
    assert [score.value for score in scored(config, texts, tests)] == [1.0, 0.5, 0.0]
    strict = ScorerConfig(name="tests", code=CONFIG.model_copy(update={"partial": False}))
    assert [score.value for score in scored(strict, texts, tests)] == [1.0, 0.0, 0.0]


def test_a_row_without_tests_is_a_failure_and_no_zero() -> None:
    (score,) = scored(ScorerConfig(name="tests", code=CONFIG), [SQUARE], None)
    assert score.value is None
    assert "column 'tests'" in str(score.failure)


# In a user namespace that permits no further ones: what a container without them looks like.
NO_NAMESPACES = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; "$@"']
STARTED = """
import asyncio
from grpo.errors import UserError
from reward_services.code_judge import CodeJudge
from reward_services.sandbox_config import SandboxConfig
try:
    asyncio.run(CodeJudge(SandboxConfig(isolation={isolation!r}), deadline_s=60).start())
    print("started")
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux's unshare")
@pytest.mark.parametrize(
    ("isolation", "said"),
    [("required", "cannot isolate generated programs"), ("none", "started")],
)
def test_a_host_without_isolation_is_refused_unless_the_recipe_does_without(
    isolation: str, said: str
) -> None:
    program = [sys.executable, "-c", STARTED.format(isolation=isolation)]
    result = subprocess.run(
        [*NO_NAMESPACES, "sh", *program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert said in result.stdout, result.stderr
