"""How the words of a command line are read: one converter for each type of flag, whose refusals say what to write."""

from __future__ import annotations

import argparse
import math
import re
import types
import typing
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, NamedTuple

from clusterssl.spelling import flags_meant, value_meant

WORDS = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}
"""of switches"""


class Reading(NamedTuple):
    """How a flag is read."""

    read: Callable[[str], Any]
    """converter of one word"""
    many: bool = False
    """whether it takes a list"""
    choices: tuple[str, ...] | None = None
    """allowed values, if they are few"""


def reading(kind: Any, default: Any) -> Reading:
    """How a flag of this type is read; its default serves as an example."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        example = default[0] if isinstance(default, tuple) and default else None
        return Reading(reading(typing.get_args(kind)[0], example).read, many=True)
    if origin is Literal:
        choices = typing.get_args(kind)
        return Reading(partial(_one_of, choices), choices=choices)
    if origin in (types.UnionType, typing.Union):
        return reading(next(part for part in typing.get_args(kind) if part is not type(None)), default)
    if kind is bool:
        return Reading(_boolean)
    if kind in (int, float):
        return Reading(partial(_whole_number if kind is int else _number, example=default))
    return Reading(getattr(kind, "parse", kind))


def underscored(word: str) -> str:
    """`--base-lr=1` as `--base_lr=1`; words that are no flags stay as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def is_flag(word: str) -> bool:
    """Whether a word names a flag; -5 and -1e-4 are numbers."""
    return word.startswith("-") and not re.match(r"-\.?\d", word)


def unknown(word: str, names: Collection[str]) -> str:
    """What to say about a word that was not understood, with the flags that may have been meant."""
    if not word.startswith("-"):
        return f"{word!r}: not expected here, flags begin with --; see --help"
    given = word.split("=")[0]
    *most, last = [f"--{name}" for name in flags_meant(given.lstrip("-").replace("-", "_"), names)] or [""]
    meant = f"{', '.join(most)} or {last}" if most else last
    return f"{given}: unknown flag" + (f"; did you mean {meant}?" if meant else "; see --help")


def _one_of(choices: tuple[str, ...], word: str) -> str:
    if word in choices:
        return word
    near = value_meant(word, choices)
    meant = f"; did you mean {near}?" if near else ""
    raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}{meant}")


def _boolean(word: str) -> bool:
    if word.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false; write one of them")
    return WORDS[word.lower()]


def _whole_number(word: str, example: int | None) -> int:
    """Also reads 1e10, as SwAV's published default of a whole-number flag is written."""
    number = _parsed(word)
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number; write one{such_as(example)}")
    return int(word) if word.lstrip("+-").isdigit() else int(number)


def _number(word: str, example: float | None) -> float:
    number = _parsed(word)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{word!r} is not a finite number; write one{such_as(example)}")
    return number


def _parsed(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def such_as(example: float | None) -> str:
    """The end of a sentence that shows a number which would do, if there is one."""
    return "" if example is None else f" such as {example:g}" if isinstance(example, float) else f" such as {example}"
