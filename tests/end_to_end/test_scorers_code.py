"""Generated programs against unit tests: partial scores, and verdicts that no program can forge."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.types import Score
from reward_services.config import ScorerConfig
from reward_services.sandbox import Program, RunReport, Sandbox, SandboxLost
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
    return results(Sandbox(CONFIG), CONFIG, source, read_tests(tests), end=time.monotonic() + 60)


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


# What a right program may return, take or raise: (program, test).
RIGHT = {
    "infinity": ("def f(): return [1.0, float('-inf')]", "assert f()[1] == float('-inf')"),
    "nan": ("def f(x): return x != x", "assert f(float('nan')) is True"),
    "a complex number": ("def f(x): return x * 1j", "assert f(2) == 2j"),
    "a large int": ("def f(n): return 10 ** n", "assert f(5000) == 10 ** 5000"),
    "a long text": ("def f(): return 'x' * (2 << 20)", "assert len(f()) == 2 << 20"),
    "a surrogate": ("def f(): return '\\ud800'", "assert f() == '\\ud800'"),
    "bytes": ("def f(b): return bytearray(b)", "assert f(b'\\xff') == bytearray(b'\\xff')"),
    "a deep list": (
        "def f():\n    a = []\n    for _ in range(150): a = [a]\n    return a",
        "assert len(f()) == 1",
    ),
    "Counter": (
        "from collections import Counter\ndef f(x): return Counter(x)",
        "assert f('aab').most_common(1) == [('a', 2)]",
    ),
    "defaultdict": (
        "from collections import defaultdict\ndef f():\n"
        "    d = defaultdict(list)\n    d[1].append(2)\n    return d",
        "d = f()\nassert d == {1: [2]} and d[7] == []",
    ),
    "OrderedDict": (
        "from collections import OrderedDict\ndef f(): return OrderedDict(a=1)",
        "assert list(f().items()) == [('a', 1)]",
    ),
    "deque": (
        "from collections import deque\ndef f(x): return deque(x)",
        "from collections import deque\nassert f([1, 2]) == deque([1, 2])",
    ),
    "a named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2) and f().y == 2",
    ),
    "sets": (
        "def f(): return {frozenset([1]), frozenset()}",
        "assert f() == {frozenset([1]), frozenset()}",
    ),
    "views": (
        "D = {1: 2}\ndef f(): return D.keys(), D.values(), D.items()",
        "k, v, i = f()\nassert k == {1} and list(v) == [2] and i == {(1, 2)}",
    ),
    "a range": ("def f(n): return range(n)", "assert f(3) == range(3) and list(f(2)) == [0, 1]"),
    "a generator": (
        "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1",
        "from itertools import islice\ng = f()\nassert next(g) == 0\n"
        "assert list(islice(g, 3)) == [1, 2, 3]",
    ),
    "map and zip": (
        "def f(n): return zip(map(str, range(n)), 'ab')",
        "assert list(f(3)) == [('0', 'a'), ('1', 'b')]",
    ),
    "an iterator as argument": ("def f(x): return sum(x)", "assert f(n for n in (1, 2)) == 3"),
    "an own iterable": (
        "class Own:\n    def __iter__(self): return iter([1, 2])\ndef f(): return Own()",
        "assert sorted(f()) == [1, 2]",
    ),
    "Fraction and Decimal": (
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "def f(): return Fraction(1, 2), Decimal('0.10')",
        "from decimal import Decimal\nassert f() == (0.5, Decimal('0.1'))",
    ),
    "dates": (
        "from datetime import timedelta\ndef f(d): return d + timedelta(days=1)",
        "from datetime import date\nassert f(date(2024, 2, 28)) == date(2024, 2, 29)",
    ),
    "a function as argument": ("def f(g, x): return g(x)", "assert f(lambda x: x + 1, 2) == 3"),
    "a builtin as argument": ("def f(g, x): return g(x)", "assert f(max, [2, 3]) == f(int, '3')"),
    "a function that uses the program's": (
        "def f(g, x): return g(x)\ndef double(x): return 2 * x",
        "assert f(lambda x: double(x) + f(double, x), 2) == 8",
    ),
    "a builtin under another name": ("f = len", "assert f([1, 2]) == 2"),
    "a function as result": ("def f(n): return lambda x: x + n", "assert f(1)(2) == 3"),
    "a constant": ("N = [3]", "assert N == [3]"),
    "a module that the program imports": (
        "import math\ndef f(): return 2",
        "assert f() == math.sqrt(4)",
    ),
    "a data class inside": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\ndef f(): return P(3).x",
        "assert f() == 3",
    ),
    "an enumeration of ints": (
        "from enum import IntEnum\nclass E(IntEnum):\n    A = 3\ndef f(): return E.A",
        "assert f() == 3",
    ),
    "an error with its words": (
        "def f(): raise KeyError('no such key')",
        "try:\n    f()\nexcept KeyError as error:\n    assert error.args == ('no such key',)\n"
        "else:\n    assert False",
    ),
    "an own kind of ValueError": (
        "class E(ValueError): pass\nclass F(E): pass\ndef f(): raise F('x')",
        "for kind in (F, E, ValueError):\n    try:\n        f()\n        assert False\n"
        "    except kind as error:\n        assert str(error) == 'x'",
    ),
    "UnicodeDecodeError": (
        "def f(b): return b.decode()",
        "try:\n    f(b'\\xff')\n    assert False\nexcept UnicodeDecodeError as error:\n"
        "    assert error.start == 0",
    ),
    "an error of the test's function": (
        "def f(g):\n    try: g()\n    except ZeroDivisionError: return 'caught'",
        "assert f(lambda: 1 / 0) == 'caught'",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_a_right_program_returns_takes_and_raises_arrives(name: str) -> None:
    source, test = RIGHT[name]
    (result,) = found(source, [test])
    assert result.outcome == "passed", result


def test_numbers_of_numpy_arrive(tmp_path: Path) -> None:
    """Where the sandbox has no numpy of its own, `folders` shows it one."""
    import numpy

    folder = str(Path(numpy.__file__).parents[1])
    config = CONFIG.model_copy(update={"folders": (folder,), "memory_mb": 1024, "time_s": 10})
    source = (
        f"import sys\nsys.path.append({folder!r})\nimport numpy as np\n"
        "def f(): return np.float64(1.5), np.arange(4).reshape(2, 2), np.int8(3)"
    )
    test = (
        f"import sys\nsys.path.append({folder!r})\nimport numpy\nx, a, n = f()\n"
        "assert x == 1.5 and n == 3 and n.dtype == 'int8'\n"
        "assert a.shape == (2, 2) and (a == [[0, 1], [2, 3]]).all()"
    )
    (result,) = results(Sandbox(config), config, source, [test], end=time.monotonic() + 60)
    assert result.outcome == "passed", result


def test_the_time_of_all_tests_is_held_whatever_their_number() -> None:
    statements = ["assert f(2) == 4"] * 30
    printed = [{"input": "", "output": ""}] * 30
    slow = "import time\ndef f(x):\n    time.sleep(0.6)\n    return x * x\n"
    for source, tests in ((slow, statements), (slow + "f(1)", printed)):
        start = time.monotonic()
        ended = results(Sandbox(CONFIG), CONFIG, source, read_tests(tests), end=start + 3)
        assert time.monotonic() - start < 3.5
        outcomes = [result.outcome for result in ended]
        passed = outcomes.count("passed")
        assert 1 <= passed <= 5
        assert outcomes == ["passed"] * passed + ["time"] * (30 - passed)


class LosesItsSecond(Sandbox):
    """The first program passes; the second is lost when the time is over, or before."""

    num_runs = 0

    def __init__(self, config: SandboxConfig, *, waits: bool) -> None:
        super().__init__(config)
        self._waits = waits

    def run(self, program: Program, *, cpu_s: float, until: float = 0.0) -> RunReport:
        self.num_runs += 1
        if self.num_runs == 1:
            return RunReport(ending="finished", stdout=b"", detail="")
        while self._waits and time.monotonic() < until:
            pass
        raise SandboxLost("not built")


def test_a_sandbox_that_is_lost_as_the_time_ends_is_no_way_out_of_a_score() -> None:
    tests = read_tests([{"input": "", "output": ""}] * 2)
    late = LosesItsSecond(CONFIG, waits=True)
    ended = results(late, CONFIG, "", tests, end=time.monotonic() + 0.1)
    assert [result.outcome for result in ended] == ["passed", "time"]
    with pytest.raises(SandboxLost):
        results(LosesItsSecond(CONFIG, waits=False), CONFIG, "", tests, end=time.monotonic() + 60)


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
    "os.write(3, (json.dumps({'value': 49}) + '\\n').encode() * 9)\n"
    "def square(x): return True",
    "replaces the builtins": "import builtins\nbuiltins.AssertionError = ValueError\n"
    "builtins.repr = lambda x: 'True'\ndef square(x): return 48",
    "raises what the tests raise": "def square(x): raise AssertionError('passed')",
    "leaves as if all were well": "def square(x): raise SystemExit(0)",
    "swaps the loader's files": "import os, sys\n"
    "for name in ('/program/tests.json', '/program/x'):\n"
    "    try: open(name, 'w').write('[]')\n    except OSError: pass\n",
    "looks for the tests": "import glob, os\n"
    "found = glob.glob('/program/**', recursive=True) + glob.glob('/tmp/**', recursive=True)\n"
    "files = [name for name in found if os.path.isfile(name)]\n"
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


_REPLACED = "from reward_services.far_values import Link\nlend = Link._lent_out\n"
# Against tests that give a program more to play with: (program, test).
FURTHER_FORGERIES = {
    "items equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef f(x):\n    yield Any()",
        "assert list(f(7)) == [49]",
    ),
    "ends the loop of the test": (
        "def f(x): raise StopIteration",
        "assert all(map(lambda x: f(x) == x * x, [7, 8]))",
    ),
    "ends the loop by an error of its own": (
        "class E(StopIteration): pass\ndef f(x): raise E",
        "assert all(map(lambda x: f(x) == x * x, [7, 8]))",
    ),
    "a method of its own in a named tuple": (
        "from collections import namedtuple\n"
        "def f(x): return namedtuple('T', 'startswith')(lambda text: True)",
        "assert f(7).startswith('49')",
    ),
    "an own class with methods": (
        "class T:\n    def startswith(self, text): return True\ndef f(x): return T()",
        "assert f(7).startswith('49')",
    ),
    "an attribute that is near everything": (
        "class Near:\n    def __sub__(self, other): return 0\n    __rsub__ = __sub__\n"
        "def f(x): return Near()",
        "assert abs(f(7) - 49) < 1",
    ),
    "contains everything": (
        "class All:\n    def __contains__(self, x): return True\n"
        "    def __iter__(self): return iter([])\ndef f(x): return All()",
        "assert 49 in f(7)",
    ),
    "a text that is a program for eval": (
        _REPLACED
        + "Link._lent_out = lambda self, v: ['builtin', 'eval'] if v is f else lend(self, v)\n"
        "def g(x): return \"type('Any', (), {'__eq__': lambda a, b: True})()\"\n"
        "def f(x): pass",
        "assert f(g(7)) == 49",
    ),
    "another module under the name": (
        "import operator as math\nmath.sqrt = lambda x: 49\ndef f(x): return 49.5",
        "assert f(7) == math.sqrt(49 * 49)",
    ),
    "code of the function it was given": (
        "def f(g): return g.__globals__['expected']",
        "expected = 49\nassert f(lambda: expected + 1) == expected",
    ),
    "things that it was not given": (
        "def f(g):\n    found = []\n"
        "    for n in range(9):\n"
        "        for what in ('name', 'call', 'attr', '__globals__'):\n"
        "            try: found.append(g._link.ask(what, 'expected' if what == 'name' else n))\n"
        "            except BaseException: pass\n"
        "    return 49 if 49 in found else None",
        "expected = 49\nassert f(lambda: 50) == expected",
    ),
}


@pytest.mark.parametrize("name", FURTHER_FORGERIES)
def test_nothing_that_is_carried_helps_to_forge(name: str) -> None:
    source, test = FURTHER_FORGERIES[name]
    (result,) = found(source, [test])
    assert result.outcome == "failed", result
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


def test_a_program_cannot_make_its_own_score_a_failure() -> None:
    hostile = (
        "import os, resource, signal\n"
        "for s in range(1, 65):\n"
        "    try: os.kill(1, s)\n    except OSError: pass\n"
        "for l in range(16):\n"
        "    try: resource.prlimit(1, l, (0, 0))\n    except OSError: pass\n"
        "os.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = ScorerConfig(name="tests", code=CONFIG)
    for tests in ([{"input": "", "output": "4"}], ["assert square(2) == 4"]):
        (score,) = scored(config, [hostile], tests)
        assert (score.value, score.failure) == (0.0, None)


def test_the_deadline_ends_a_program_and_keeps_what_has_passed() -> None:
    text = "import time\ndef f(x):\n    if x: time.sleep(100)\n    return x"
    config = ScorerConfig(name="tests", code=CONFIG, deadline_s=4)
    start = time.monotonic()
    (score,) = scored(config, [text], ["assert f(0) == 0"] + ["assert f(1) == 1"] * 9)
    assert score.value == 0.1
    assert time.monotonic() - start < 4 + 1  # one for the sandbox that start() tries


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
