from __future__ import annotations

import itertools
import json
import signal
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import eval_linear
import main_deepclusterv2
import main_swav
from clusterssl import config as cfg
from clusterssl.errors import UserError
from tests.golden_files import FOLDER

FLAGS = json.loads((FOLDER / "published_flags.json").read_text())
RECIPES = json.loads((FOLDER / "published_recipes.json").read_text())
SCRIPTS = {
    "main_swav": main_swav.Config, "main_deepclusterv2": main_deepclusterv2.Config, "eval_linear": eval_linear.Config,
}  # fmt: skip
KINDS = {"int": int, "float": float, "str": str, "bool_flag": bool}


@pytest.mark.parametrize(("script", "flag"), [(s, f) for s in SCRIPTS for f in FLAGS[s]], ids=lambda x: str(x)[:40])
def test_every_published_flag_exists_with_its_default(script: str, flag: dict) -> None:
    ours = {one.name: one.default for one in cfg.flags(SCRIPTS[script]())}
    assert flag["dest"] in ours
    default = ours[flag["dest"]]
    if flag["nargs"] == "+":
        default = [one.height if isinstance(one, cfg.Size) else one for one in default]
    assert default == flag["default"]
    first = default[0] if isinstance(default, list) else default
    assert isinstance(first, (KINDS[flag["type"]], int, float))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r["script"] == "main_swav.py"], ids=lambda r: r["name"])
def test_every_published_command_line_parses(recipe: dict) -> None:
    config = cfg.parse(main_swav.Config, recipe["flags"])
    given = dict(itertools.pairwise(recipe["flags"]))
    ours = {flag.name: flag.default for flag in cfg.flags(config)}
    for name in ("--epochs", "--arch", "--base_lr", "--sync_bn", "--queue_length", "--wd", "--hidden_mlp"):
        if name in given:
            value = ours[name[2:]]
            assert value == type(value)(given[name])


def test_published_evaluation_command_parses() -> None:
    recipe = next(r for r in RECIPES if r["script"] == "eval_linear.py")
    assert cfg.parse(eval_linear.Config, recipe["flags"])


@dataclass(frozen=True)
class Inner:
    sizes: tuple[cfg.Size, ...] = (cfg.Size(8, 8),)
    """sizes of
    things"""
    word: str = "a b"
    kind: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    on: bool = True
    number: int = 3
    maybe: float | None = None

    def __post_init__(self) -> None:
        cfg.require(self.number >= 0, f"--number {self.number}: must not be negative")


def test_reads_underscores_hyphens_lists_booleans_and_sizes() -> None:
    config = cfg.parse(Outer, ["--sizes", "4x6", "7", "--on", "False", "--number=1e3", "--maybe", "2"])
    assert config == Outer(Inner((cfg.Size(4, 6), cfg.Size(7, 7))), False, 1000, 2.0)
    assert cfg.parse(main_swav.Config, ["--base-lr", "2"]).optim.base_lr == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sises 4", "--sises: unknown flag; did you mean --sizes?"),
        ("--numb 4", "--numb: unknown flag; did you mean --number?"),
        ("-numb 4", "-numb: unknown flag; did you mean --number?"),
        ("--zzz", "--zzz: unknown flag; see --help"),
        ("stray", "'stray': not expected here"),
        ("--number 2.5", "--number: '2.5' is not a whole number; write one such as 3"),
        ("--number x", "--number"),
        ("--maybe x", "--maybe: 'x' is not a finite number; write one"),
        ("--maybe nan", "--maybe: 'nan' is not a finite number; write one"),
        ("--maybe=-inf", "--maybe: '-inf' is not a finite number; write one"),
        ("--on maybe", "--on: 'maybe' is neither true nor false; write one of them"),
        ("--kind z", "--kind: 'z' is none of x, y"),
        ("--kind Y", "--kind: 'Y' is none of x, y; did you mean y?"),
        ("--sizes 0", "--sizes: '0' is no size"),
        ("--sizes 4x5x6", "no size"),
        ("--sizes", "--sizes: expected at least one argument"),
        ("--number -1", "--number -1: must not be negative"),
    ],
)
def test_bad_words_give_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cfg.parse(Outer, words.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "argument" not in str(caught.value).replace("one argument", "")


@dataclass(frozen=True)
class Bounded:
    count: int = 5
    share: float = 0.5
    zero: int = 0
    sizes: tuple[int, ...] = (2, 3)
    absent: float | None = None
    large: int = 4194304


@pytest.mark.parametrize(
    ("change", "name", "bounds", "message"),
    [
        ({"count": 0}, "count", {"least": 1}, "--count 0: must be at least 1, such as 5"),
        ({"count": 0}, "count", {"above": 0}, "--count 0: must be above 0, such as 5"),
        ({"share": 1.0}, "share", {"least": 0, "below": 1}, "--share 1.0: must be at least 0 and below 1, such as 0.5"),
        ({"share": 2.0}, "share", {"above": 0, "most": 1}, "--share 2.0: must be above 0 and at most 1, such as 0.5"),
        ({"share": float("nan")}, "share", {"least": 0}, "--share nan: must be at least 0, such as 0.5"),
        ({"share": float("inf")}, "share", {"least": 0}, "--share inf: must be at least 0, such as 0.5"),
        ({"zero": -1}, "zero", {"least": 0}, "--zero -1: must be at least 0"),
        ({"sizes": (4, 0)}, "sizes", {"least": 1}, "--sizes 4 0: must be at least 1"),
        ({"absent": -1.0}, "absent", {"least": 0}, "--absent -1.0: must be at least 0"),
        ({"large": 0}, "large", {"least": 1}, "--large 0: must be at least 1, such as 4194304"),
    ],
)
def test_numbers_out_of_bounds_name_the_bounds_and_an_example(
    change: dict, name: str, bounds: dict, message: str
) -> None:  # fmt: skip
    with pytest.raises(UserError) as caught:
        cfg.require_numbers(Bounded(**change), name, **bounds)
    assert str(caught.value) == message
    cfg.require_numbers(Bounded(), name, **bounds)


def test_command_gives_the_configuration_back() -> None:
    config = Outer(Inner((cfg.Size(4, 6), cfg.Size(9, 9)), kind="y"), on=False, maybe=0.5)
    words = cfg.command("script.py", config, Outer()).split()
    assert words[:2] == ["python", "script.py"] and cfg.parse(Outer, words[2:]) == config


def test_digits_preset_is_the_command_it_prints() -> None:
    words = cfg.command("main_swav.py", main_swav.DIGITS, main_swav.Config()).split()
    assert cfg.parse(main_swav.Config, words[2:]) == main_swav.DIGITS


def test_plain_holds_json_values() -> None:
    assert json.loads(json.dumps(cfg.plain(Outer()))) == {
        "sizes": [[8, 8]], "word": "a b", "kind": "x", "on": True, "number": 3, "maybe": None,
    }  # fmt: skip


def test_help_shows_the_text_under_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cfg.parse(Outer, ["--help"], description="What it is.")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "What it is." in shown and "sizes of things (default: 8)" in shown


@pytest.mark.parametrize(
    "flag", [*cfg.flags(main_swav.Config()), *cfg.flags(main_deepclusterv2.Config())], ids=lambda flag: flag.name
)
def test_every_flag_has_help(flag: cfg.Flag) -> None:
    assert len(flag.help) > 10


def test_another_vocabulary_is_translated() -> None:
    aliases = {"lr": "base_lr", "b": "batch_size", "print_freq": "log_freq", "verbose": None, "gpus": None}
    words = ["DIR", "--lr=0.3", "-b", "64", "--verbose", "--gpus", "0", "1", "--print-freq", "5", "--wd", "-5"]
    ours = ["--data_path", "DIR", "--base_lr=0.3", "--batch_size", "64", "--log_freq", "5", "--wd", "-5"]
    assert cfg.translate(words, aliases, positional="data_path") == ours
    assert cfg.translate(["--lr", "-1e-4"], aliases) == ["--base_lr", "-1e-4"]
    assert cfg.translate(ours, aliases, positional="data_path") == ours


def test_negative_values_of_some_flags_are_powers_of_ten() -> None:
    words = ["--wd", "-5", "--lr", "-5", "--decay", "-4.5", "--wd", "1e-6", "DIR"]
    ours = ["--wd", "1e-05", "--lr", "-5", "--wd", "3.16228e-05", "--wd", "1e-6", "DIR"]
    assert cfg.translate(words, {"decay": "wd"}, powers=["wd"]) == ours


def test_a_switch_needs_no_value() -> None:
    @dataclass(frozen=True)
    class Switches:
        sobel: bool = False
        """front end"""
        other: int = 1
        """number"""

    assert cfg.parse(Switches, ["--sobel"]).sobel
    assert cfg.parse(Switches, ["--sobel", "--other", "2"]) == Switches(True, 2)
    assert not cfg.parse(Switches, ["--sobel", "false"]).sobel


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["/somewhere/main_swav.py"])
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        with pytest.raises(SystemExit) as ended:
            cfg.entry(interrupted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 130 and capsys.readouterr() == ("", "main_swav.py: interrupted\n")
