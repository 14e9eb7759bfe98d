"""Values between two sandboxes: data arrives as data, of types that the receiver knows.

Functions and iterators stay where they are, to be called and iterated from afar. Whatever else one
side has is for the other a thing that equals nothing: no code of a sender ever runs where its value
arrives. Knows nothing of tests. Standard library only, and numpy where the sender used it.
"""

from __future__ import annotations

import builtins
import json
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

_MAX_MESSAGE_BYTES = 8 << 20
_MAX_PLAIN_INT = 1 << 63  # JSON readers refuse decimals of more than 4,300 digits


class LinkClosed(BaseException):
    """The other side has ended, or sends no messages. Not an Exception, which a test may expect."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How a type of data comes apart and together again; the parts are values themselves."""

    kind: type
    parts: Callable[[Any], Iterable[object]]
    made: Callable[..., object]


def _made_defaultdict(factory: Callable[[], object] | None, *pairs: Any) -> object:
    return defaultdict(factory if isinstance(factory, type) else None, pairs)


def _made_namedtuple(name: str, fields: Sequence[str], *items: object) -> object:
    if any(isinstance(item, Far) for item in items):  # else it had methods of the sender's
        raise TypeError("found a function or an object in a named tuple; expected data")
    made: Callable[..., object] = namedtuple(name, fields)  # type: ignore[misc]  # known late
    return made(*items)


def _made_array(kind: str, shape: Sequence[int], items: Sequence[object]) -> object:
    import numpy  # where the tests run; the sender had it

    array = numpy.array(items, dtype=numpy.dtype(kind)).reshape(shape)
    return array if shape else array[()]


# The first that fits: a subclass before its base. What derives from a type arrives as that type.
_FORMS = {
    "int": _Form(int, lambda v: [hex(v)], lambda text: int(text, 16)),
    "float": _Form(float, lambda v: [float.__float__(v)], float),
    "complex": _Form(complex, lambda v: [v.real, v.imag], complex),
    "str": _Form(str, lambda v: [str.__str__(v)], str),
    "bytes": _Form(bytes, lambda v: [v.hex()], bytes.fromhex),
    "bytearray": _Form(bytearray, lambda v: [v.hex()], bytearray.fromhex),
    "range": _Form(range, lambda v: [v.start, v.stop, v.step], range),
    "slice": _Form(slice, lambda v: [v.start, v.stop, v.step], slice),
    "Fraction": _Form(Fraction, lambda v: [v.numerator, v.denominator], Fraction),
    "Decimal": _Form(Decimal, lambda v: [str(v)], Decimal),
    "datetime": _Form(datetime, lambda v: [v.isoformat()], datetime.fromisoformat),
    "date": _Form(date, lambda v: [v.isoformat()], date.fromisoformat),
    "time": _Form(time, lambda v: [v.isoformat()], time.fromisoformat),
    "timedelta": _Form(timedelta, lambda v: [v.days, v.seconds, v.microseconds], timedelta),
    "Counter": _Form(Counter, lambda v: v.items(), lambda *p: Counter(dict(p))),
    "OrderedDict": _Form(OrderedDict, lambda v: v.items(), lambda *p: OrderedDict(p)),
    "defaultdict": _Form(defaultdict, lambda v: [v.default_factory, *v.items()], _made_defaultdict),
    "dict": _Form(dict, lambda v: v.items(), lambda *p: dict(p)),
    "keys": _Form(type({}.keys()), lambda v: v, lambda *p: dict.fromkeys(p).keys()),
    "values": _Form(type({}.values()), lambda v: v, lambda *p: dict(enumerate(p)).values()),
    "items": _Form(type({}.items()), lambda v: v, lambda *p: dict(p).items()),
    "list": _Form(list, lambda v: v, lambda *p: list(p)),
    "tuple": _Form(tuple, lambda v: v, lambda *p: p),
    "set": _Form(set, lambda v: v, lambda *p: set(p)),
    "frozenset": _Form(frozenset, lambda v: v, lambda *p: frozenset(p)),
    "deque": _Form(deque, lambda v: [v.maxlen, *v], lambda maxlen, *p: deque(p, maxlen)),
}
_OTHER_FORMS: dict[str, Callable[..., object]] = {
    "namedtuple": _made_namedtuple,
    "array": _made_array,
    "kind": lambda tag: _FORMS[tag].kind,
}


class Far:
    """A thing of the other side; equal to itself and to nothing that is here."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number


class FarFunction(Far):
    """Runs over there; arguments and result are carried."""

    def __call__(self, *arguments: object, **named: object) -> object:
        return self._link.ask("call", self._number, arguments, named)


class FarIterable(Far):
    """Each item is asked for when it is its turn."""

    def __iter__(self) -> Iterator[object]:
        found: Any = self._link.ask("iter", self._number)
        return found if isinstance(found, FarIterable) else iter(found)

    def __next__(self) -> object:
        return self._link.ask("next", self._number)


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


_FAR = {"function": FarFunction, "iterable": FarIterable, "thing": Far}


class Link:
    """One end of a connection; each end may ask the other, also while it is being asked.

    `names`, at the program's end only, is what the tests may ask for by name. The program's end
    takes any builtin function for its own; the tests' end takes data types and errors alone, since
    `eval`, in the place of a function of the program, would run here what the program says.
    """

    def __init__(self, fd: int, names: Mapping[str, object] | None = None) -> None:
        self._out = open(fd, "wb", closefd=False)  # noqa: SIM115 (open until the end)
        self._in = open(fd, "rb", closefd=False)  # noqa: SIM115
        self._names, self._is_program = names or {}, names is not None
        self._lent: list[object] = []
        self._numbers: dict[int, int] = {}  # id of what was lent (and so stays alive) -> its number
        self._met: dict[int, Far] = {}
        self._errors: dict[tuple[object, ...], type] = {}

    def ask(self, *question: object) -> Any:
        """The other side's answer; raises what was raised there."""
        self._send({"ask": [self._encoded(part) for part in question]})
        while True:
            message = self._received()
            if "value" in message:
                return self._decoded(message["value"])
            if "raised" in message:
                error = self._error(*message["raised"])
                if isinstance(error, StopIteration) and question[0] != "next":
                    raise RuntimeError("the program raised StopIteration")  # would end a loop here
                raise error
            self._answer(message["ask"])

    def answer(self) -> None:
        """Answer the next question."""
        self._answer(self._received()["ask"])

    def _answer(self, question: list[Any]) -> None:
        try:
            reply = {"value": self._encoded(self._done(*map(self._decoded, question)))}
        except Exception as error:
            kind, arguments = self._encoded(type(error)), self._encoded(error.args)
            reply = {"raised": [kind, arguments, f"{type(error).__name__}: {error}"]}
        self._send(reply)

    def _done(
        self, what: str, target: Any, arguments: Any = (), named: Mapping[str, Any] | None = None
    ) -> object:
        """No more than this can be asked for: what was lent gives no way to what it consists of."""
        if what == "name":
            if target not in self._names:
                raise NameError(f"name {target!r} is not defined")
            return self._names[target]
        lent: Any = self._lent[target]
        if what == "call":
            return lent(*arguments, **(named or {}))
        return next(lent) if what == "next" else iter(lent)

    def _encoded(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int and abs(value) < _MAX_PLAIN_INT:
            return value
        if isinstance(value, Far):
            return ["yours", value._number]
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufcSU":
            parts = value.dtype.str, value.shape, value.tolist()
            return ["array", *map(self._encoded, parts)]
        fields = getattr(value, "_fields", None)
        if isinstance(value, tuple) and isinstance(fields, tuple):
            return ["namedtuple", *map(self._encoded, (kind.__name__, fields, *value))]
        for tag, form in _FORMS.items():
            if isinstance(value, form.kind):
                return [tag, *map(self._encoded, form.parts(value))]
        return self._lent_out(value)

    def _lent_out(self, value: Any) -> list[Any]:
        name = getattr(value, "__name__", "")
        if (known := _FORMS.get(str(name))) and known.kind is value:
            return ["kind", name]
        is_builtin = name and getattr(builtins, str(name), None) is value
        if is_builtin and (_is_error(value) or not self._is_program):
            return ["builtin", name]
        if _is_error(value):
            return ["error", name, *map(self._encoded, value.__bases__)]
        number = self._numbers.setdefault(id(value), len(self._lent))
        if number == len(self._lent):
            self._lent.append(value)
        if callable(value):
            return ["mine", number, "function"]
        return ["mine", number, "iterable" if hasattr(type(value), "__iter__") else "thing"]

    def _decoded(self, tree: Any) -> Any:
        if not isinstance(tree, list):
            return tree
        tag, *parts = tree
        if tag == "mine":
            return self._met.setdefault(parts[0], _FAR[parts[1]](self, parts[0]))
        if tag == "yours":
            return self._lent[parts[0]]
        values = [self._decoded(part) for part in parts]
        if tag == "builtin":
            return self._builtin(*values)
        if tag == "error":
            name, *bases = values
            return self._errors.setdefault((name, *bases), type(name, tuple(bases), {}))
        return (_FORMS[tag].made if tag in _FORMS else _OTHER_FORMS[tag])(*values)

    def _builtin(self, name: str) -> object:
        value = getattr(builtins, name)
        if not (self._is_program or _is_error(value)):
            raise TypeError(f"found the builtin {name} as a value; expected data")
        return value

    def _error(self, kind: Any, arguments: Any, words: str) -> BaseException:
        made, values = self._decoded(kind), self._decoded(arguments)
        if not _is_error(made):
            return RuntimeError(words)
        try:
            return made(*values)
        except TypeError:  # such as a UnicodeDecodeError of one argument
            return RuntimeError(words)

    def _send(self, message: object) -> None:
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except OSError:
            raise LinkClosed("the program ended") from None

    def _received(self) -> dict[str, Any]:
        line = self._in.readline(_MAX_MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise LinkClosed("the program ended, or answered at endless length")
        message = json.loads(line)
        if not isinstance(message, dict) or not message.keys() & {"ask", "value", "raised"}:
            raise LinkClosed("the program sent what is no message")
        return message
