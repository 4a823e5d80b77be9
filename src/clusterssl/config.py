"""From frozen dataclasses to command lines: one place for the name, type, default, help and check of each flag.

A script's configuration is a frozen dataclass whose fields are flags or groups (frozen dataclasses themselves); groups
only order the help page, the command line is flat. The string under a field is its help.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import operator
import os
import shlex
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from clusterssl import early
from clusterssl.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_STOPPED, DataGone, Stopped, UserError
from clusterssl.words import is_flag, reading, such_as, underscored, unknown

C = TypeVar("C")
IGNORED = "accepted and ignored"
"""how the help of a flag begins that does nothing, and that nobody can have meant"""


class Size(NamedTuple):
    """Height and width of a crop in pixels; on the command line `224` (square) or `224x112` (height x width)."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read one size.

        Raises:
            argparse.ArgumentTypeError: neither a positive whole number nor two of them joined by an x.
        """
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no size; give pixels like 224, or height x width like 224x112"
            )
        return cls(int(parts[0]), int(parts[-1]))

    def __str__(self) -> str:
        return f"{self.height}" if self.height == self.width else f"{self.height}x{self.width}"


class Flag(NamedTuple):
    """One flag of the command line: where it lives in the configuration and what it means."""

    path: tuple[str, ...]
    type: Any
    default: Any
    help: str

    @property
    def name(self) -> str:
        return self.path[-1]


def flags(config: Any) -> Iterator[Flag]:
    """All flags of a configuration (an instance), groups entered in order."""
    yield from _flags(config, ())


def _flags(config: Any, prefix: tuple[str, ...]) -> Iterator[Flag]:
    hints = typing.get_type_hints(type(config))
    helps = _helps(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = (*prefix, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, path)
        else:
            yield Flag(path, hints[field.name], value, helps.get(field.name, ""))


def _helps(cls: type) -> dict[str, str]:
    """The string expression under each field, of this class and the dataclasses it inherits from."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def parse(
    cls: type[C], argv: Sequence[str] | None = None, *, description: str = "", default: C | None = None,
    usage: str | None = None,
) -> C:  # fmt: skip
    """Read a command line.

    Args:
        cls: frozen dataclass of flags and groups; every field has a default.
        argv: words after the program's name; those of this process when None.
        description: first lines of `--help`.
        default: values of the flags that are not given; `cls()` when None.
        usage: first line of `--help`, where more than flags are to be given.

    Raises:
        UserError: an unknown flag (with the nearest names), a value of the wrong kind, or values that contradict.
    """
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    start = cls() if default is None else default
    known = {flag.name: flag for flag in flags(start)}
    parser = _parser(list(known.values()), description, usage)
    given, left = parser.parse_known_args(words)
    if left:
        raise UserError(unknown(left[0], [name for name in known if not known[name].help.startswith(IGNORED)]))
    values = {known[name].path: value for name, value in vars(given).items()}
    return _replace(start, values)


def translate(
    argv: Sequence[str], aliases: Mapping[str, str | None], *, positional: str = "", powers: Collection[str] = ()
) -> list[str]:
    """A command line in another vocabulary as one in ours.

    Args:
        argv: words after the program's name.
        aliases: from a flag's name there (underscores, without its hyphens; one letter for a short flag) to ours; None:
            accepted and ignored, with its values.
        positional: our flag for a first word that is no flag.
        powers: our flags whose negative values are powers of ten there: -5 is 1e-05.
    """
    words: list[str] = [f"--{positional}"] if positional and argv and not argv[0].startswith("-") else []
    ignored = False
    for word in map(underscored, argv):
        name, equals, value = word.lstrip("-").partition("=")
        if not is_flag(word):
            power = word.startswith("-") and bool(words) and words[-1].lstrip("-") in powers
            words += [] if ignored else [f"{10 ** float(word):g}" if power else word]
            continue
        ignored = name in aliases and aliases[name] is None
        if not ignored:
            words.append(f"--{aliases[name]}{equals}{value}" if name in aliases else word)
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(" ".join(message.split()).removeprefix("argument "))


def _parser(known: list[Flag], description: str, usage: str | None) -> argparse.ArgumentParser:
    how = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, usage=usage, allow_abbrev=False, formatter_class=how)
    groups: dict[tuple[str, ...], Any] = {}
    for flag in known:
        place = flag.path[:-1]
        if place not in groups:
            groups[place] = parser.add_argument_group(" ".join(place) or "flags")
        read, many, choices = reading(flag.type, flag.default)
        text = f"{flag.help} (default: {_shown(flag.default) or 'none'})".replace("%", "%%")
        groups[place].add_argument(
            f"--{flag.name}", dest=flag.name, type=read, nargs="+" if many else "?" if flag.type is bool else None,
            const=True if flag.type is bool else None, choices=choices, default=argparse.SUPPRESS, help=text,
            metavar=None if choices else flag.name.upper(),
        )  # fmt: skip
    return parser


def _replace(config: Any, values: dict[tuple[str, ...], Any], prefix: tuple[str, ...] = ()) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        path, old = (*prefix, field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(old):
            changes[field.name] = _replace(old, values, path)
        elif path in values:
            changes[field.name] = tuple(values[path]) if isinstance(values[path], list) else values[path]
    return dataclasses.replace(config, **changes)


def gives(argv: Sequence[str] | None, name: str) -> bool:
    """Whether a command line sets the flag `name` (underscores; hyphens and `=` are understood)."""
    words = sys.argv[1:] if argv is None else argv
    return any(underscored(word).partition("=")[0] == f"--{name}" for word in words)


def command(script: str, config: Any, base: Any) -> str:
    """The shell command that gives `config` to a script whose defaults are `base`."""
    defaults = {flag.name: flag.default for flag in flags(base)}
    words = ["python", script]
    for flag in flags(config):
        if flag.default != defaults[flag.name]:
            many = isinstance(flag.default, tuple) and not isinstance(flag.default, Size)
            words += [f"--{flag.name}", *(map(_shown, flag.default) if many else [_shown(flag.default)])]
    return shlex.join(words)


def _shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple) and not isinstance(value, Size):
        return " ".join(_shown(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def plain(config: Any) -> dict[str, Any]:
    """Flag names and values as JSON can hold them (tuples become lists)."""

    def simple(value: Any) -> Any:
        return [simple(part) for part in value] if isinstance(value, (tuple, list)) else value

    return {flag.name: simple(flag.default) for flag in flags(config)}


def require(holds: bool, message: str) -> None:
    """Raise `UserError(message)` unless a condition on the flags holds."""
    if not holds:
        raise UserError(message)


def require_numbers(
    options: Any, *names: str, least: float | None = None, above: float | None = None,
    most: float | None = None, below: float | None = None,
) -> None:  # fmt: skip
    """Raise `UserError` unless these flags of a group, and each entry of those that are lists, lie within bounds.

    A flag that is None is not given. The line shows the default, unless it is a bound itself, as an example.
    """
    bounds = [
        ("at least", least, operator.ge), ("above", above, operator.gt),
        ("at most", most, operator.le), ("below", below, operator.lt),
    ]  # fmt: skip
    asked = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]

    def fits(number: float) -> bool:
        return math.isfinite(number) and all(holds(number, bound) for _, bound, holds in asked)

    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        value, default = getattr(options, name), defaults[name]
        numbers = value if isinstance(value, tuple) else (value,)
        if value is None or (numbers and all(map(fits, numbers))):
            continue
        rule = " and ".join(f"{words} {bound:g}" for words, bound, _ in asked)
        shows = isinstance(default, (int, float)) and fits(default) and default not in (least, most)
        raise UserError(f"--{name} {_shown(value)}: must be {rule}" + (f",{such_as(default)}" if shows else ""))


def entry(main: Callable[[], None]) -> NoReturn:
    """Run an entry script's `main` and end the process with the exit code of the contract.

    0 done; 2 bad input (one line on stderr); 75 stopped on request, resumable; 130 Ctrl-C where nothing is to be saved;
    1 (with a traceback) a defect of ours.
    Signals that would ask a training to stop are ignored until there is one; by default they would kill.
    """
    code = 0
    early.over()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)  # noqa: PTH119
        code = EXIT_STOPPED if isinstance(error, DataGone) else EXIT_BAD_INPUT
    except Stopped as stopped:
        print(f"{os.path.basename(sys.argv[0])}: {stopped}", file=sys.stderr, flush=True)  # noqa: PTH119
        code = EXIT_STOPPED
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)  # noqa: PTH119
        code = EXIT_INTERRUPTED
    sys.exit(code)
