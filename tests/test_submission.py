"""What run_with_submitit.py makes of a command line, before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterssl.errors import UserError
from clusterssl.jobs import _code
from clusterssl.submission import JobOptions, evaluations, find_script, report, split, value_of, variants

FLAGS = ["--data_path", "/data/train", "--dump-path=runs/a", "--base_lr", "1"]


def test_our_flags_end_at_the_script() -> None:
    words = ["--sweep", "lr=1", "--wait", "main_swav.py", "--wait", "x.py"]
    assert split(words) == (["--sweep", "lr=1", "--wait"], ["main_swav.py", "--wait", "x.py"])
    assert split(["--help"]) == (["--help"], [])
    with pytest.raises(UserError, match="name the script"):
        split(["--nodes", "2"])


def test_scripts_are_found_here_or_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_script("main_swav.py").name == "main_swav.py"
    (tmp_path / "main_swav.py").touch()
    assert find_script("main_swav.py") == tmp_path / "main_swav.py"
    with pytest.raises(UserError, match=r"no\.py: no such script"):
        find_script("no.py")


def test_the_last_value_of_a_flag_counts() -> None:
    assert value_of(FLAGS, "dump_path") == "runs/a" and value_of(FLAGS, "epochs") == ""
    assert value_of([*FLAGS, "--dump_path", "runs/b"], "dump_path") == "runs/b"


def test_variants() -> None:
    assert variants(FLAGS, [], []) == [tuple(FLAGS)]
    found = variants(FLAGS, ["seeds", "0", "1"], ["base-lr=0.3,0.6", "epsilon=0.05"])
    assert [words[len(FLAGS) :] for words in found[:2]] == [
        (
            "--seed",
            "0",
            "--base_lr",
            "0.3",
            "--epsilon",
            "0.05",
            "--dump_path",
            "runs/a/seed-0_base_lr-0.3_epsilon-0.05",
        ),
        (
            "--seed",
            "0",
            "--base_lr",
            "0.6",
            "--epsilon",
            "0.05",
            "--dump_path",
            "runs/a/seed-0_base_lr-0.6_epsilon-0.05",
        ),
    ]
    assert len({words[-1] for words in found}) == 4 and all(words[: len(FLAGS)] == tuple(FLAGS) for words in found)


@pytest.mark.parametrize(
    ("flags", "array", "sweep", "message"),
    [
        (FLAGS, ["seeds"], [], "--sweep seed: give values"),
        (FLAGS, [], ["base_lr"], "base_lr: give values"),
        (FLAGS, [], ["=1,2"], "give values"),
        (FLAGS[:2], ["seeds", "1"], [], "needs --dump_path"),
    ],
)
def test_variants_that_cannot_be(flags: list[str], array: list[str], sweep: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        variants(flags, array, sweep)


def test_evaluations_read_the_checkpoint_of_the_run() -> None:
    options = JobOptions(nodes=4, ngpus=8, name="swav")
    linear, knn = evaluations(FLAGS, ["eval_linear", "eval_knn --nb_knn 5"], "", options)
    assert linear.flags == (
        *("--pretrained", "runs/a/checkpoint.pth.tar", "--data_path", "/data"), *("--dump_path", "runs/a/eval_linear"),
    )  # fmt: skip
    assert knn.flags[-2:] == ("--nb_knn", "5") and knn.script.name == "eval_knn.py"
    assert (linear.options.nodes, linear.options.ngpus, linear.options.name) == (1, 8, "swav-eval_linear")
    assert value_of(evaluations(FLAGS, ["eval_knn"], "/other", options)[0].flags, "data_path") == "/other"
    digits = ["--data_path", "digits", "--dump_path", "r"]
    assert value_of(evaluations(digits, ["eval_knn"], "", options)[0].flags, "data_path") == "digits"
    assert report(FLAGS, options).flags == ("runs/a",)
    for chain, flags in ((["eval_nothing"], FLAGS), (["eval_knn"], FLAGS[:2])):
        with pytest.raises(UserError):
            evaluations(flags, chain, "", options)


@pytest.mark.parametrize(("text", "code"), [("0:0", 0), ("3:0", 3), ("0:9", 137), ("75:0", 75)])
def test_exit_codes_as_a_shell_says_them(text: str, code: int) -> None:
    assert _code(text) == code
