"""The script eval_all.py: checkpoints and protocols in one table; what one cannot do does not stop the rest."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import eval_all
import eval_knn
from clusterssl import dist
from clusterssl.errors import UserError
from clusterssl.evals.protocols import PROTOCOLS, names_of
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import restored_logger  # noqa: F401
from tests.ranks import run_ranks

QUICK = ["--nb_knn", 5, "--linear_epochs", 3, "--linear_lr", 3, "--semisup_epochs", 1, "--labels_perc", 10]
QUICK += ["--semisup_lr", 0.01, "--semisup_lr_last_layer", 0.2]


def start(folder: Path, *words: object) -> None:
    command = ["eval_all.py", "--data_path", "digits", "--dump_path", folder, *QUICK, *words]
    sys.argv = [str(word) for word in command]
    eval_all.main()


def run(folder: Path, *words: object) -> dict[str, Any]:
    """The table that a command leaves."""
    start(folder, *words)
    return json.loads((folder / "table.json").read_text())


def two_checkpoints(folder: Path) -> list[Path]:
    (folder / "mine").mkdir(parents=True, exist_ok=True)
    return [
        own_checkpoint(folder / "mine" / "checkpoint.pth.tar"), own_checkpoint(folder / "heads.pth", heads=(20,)),
    ]  # fmt: skip


COLUMNS = [
    "knn 5 top-1", "linear top-1", "linear top-5", "clusters accuracy", "clusters hungarian", "clusters nmi",
    "clusters ami", "clusters ari", "semisup 10 % top-1",
]  # fmt: skip


def test_two_checkpoints_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = two_checkpoints(tmp_path)
    protocols = ["--protocols", "knn", "linear", "clusters", "semisup"]
    found = run(tmp_path / "all", "--pretrained", *checkpoints, *protocols)
    assert list(found["rows"]) == ["mine", "heads"] and not found["failures"]
    assert all(list(row) == COLUMNS for row in found["rows"].values())
    sys.argv = ["eval_knn.py", "--data_path", "digits", "--pretrained", str(checkpoints[1]), "--nb_knn", "5"]
    sys.argv += ["--dump_path", str(tmp_path / "knn")]
    eval_knn.main()
    alone = json.loads((tmp_path / "knn" / "evaluations.jsonl").read_text())
    assert found["rows"]["heads"]["knn 5 top-1"] == alone["top1"]
    with (tmp_path / "all" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["checkpoint"]: float(row["linear top-1"]) for row in rows} == {
        name: row["linear top-1"] for name, row in found["rows"].items()
    }
    lines = (tmp_path / "all" / "table.md").read_text().splitlines()
    assert lines[2] == "| " + " | ".join(["checkpoint", *COLUMNS]) + " |" and lines[4].startswith("| mine | ")
    shown = capsys.readouterr().out
    assert "Evaluations on val of digits, percent" in shown and shown.count("resuming") == 0
    kinds = [json.loads(line)["eval"] for line in (tmp_path / "all" / "mine" / "evaluations.jsonl").open()]
    assert kinds == ["knn", "linear", "clusters", "semisup"]
    again = run(tmp_path / "all", "--pretrained", *checkpoints, *protocols)
    assert again["rows"] == found["rows"]
    shown = capsys.readouterr().out
    assert "resuming after epoch 3" in shown and shown.count("features read from") >= 4


def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    words = ["--arch", "conv4w4", "--protocols", "clusters", "knn", "--superclass", "entity13"]
    with pytest.raises(UserError, match="1 failed: untrained, clusters: --superclass entity13"):
        run(tmp_path, *words)
    found = json.loads((tmp_path / "table.json").read_text())
    assert list(found["rows"]["untrained"]) == ["knn 5 top-1"] and len(found["failures"]) == 1
    assert "--superclass entity13" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_checkpoint_does_not_stop_the_others(tmp_path: Path, place: int) -> None:
    mine, other = two_checkpoints(tmp_path)
    (tmp_path / "torn.pth").write_bytes(mine.read_bytes()[:500])
    checkpoints = [mine, other]
    checkpoints.insert(place, tmp_path / "torn.pth")
    words = ["--pretrained", *checkpoints, "--protocols", "knn"]
    with pytest.raises(UserError, match=r"1 failed: torn: .*torn\.pth"):
        run(tmp_path / "out", *words)
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert {name: list(row) for name, row in rows.items()} == {
        "mine": ["knn 5 top-1"], "torn": [], "heads": ["knn 5 top-1"],
    }  # fmt: skip


def test_bad_input(tmp_path: Path) -> None:
    (mine, _) = two_checkpoints(tmp_path)
    for words, message in (
        (["--protocols", "knn", "kmeans"], "--protocols kmeans: unknown; choose from knn, linear, clusters, semisup"),
        (["--pretrained", mine, mine], "names a checkpoint twice"),
        (["--pretrained", mine, tmp_path / "no.pth"], "no.pth: no such checkpoint"),
        (["--labels_perc", 1, 10], "give as many values"),
        (["--pretrained", mine, "--data_path", tmp_path], "expected train/ and val/"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"--dump_path .*checkpoint\.pth\.tar/out: cannot be written"):
        run(mine / "out", "--pretrained", mine)


def test_names(tmp_path: Path) -> None:
    paths = [
        "a/checkpoint.pth.tar",
        "b/a/checkpoint.pth.tar",
        "swav_800ep_pretrain.pth.tar",
        "https://h/x.pth?dl=1",
        "",
    ]
    for path in paths[:3]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    full = [str(tmp_path / path) for path in paths[:3]] + paths[3:]
    assert list(names_of(full).values()) == ["a", "a-2", "swav_800ep_pretrain", "x", "untrained"]
    (tmp_path / "a-2").mkdir()
    (tmp_path / "a-2" / "checkpoint.pth.tar").touch()
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        same = [*full[:2], str(tmp_path / "a-2" / "checkpoint.pth.tar")]
        assert len(set(names_of([same[i] for i in order]).values())) == 3


def script_on_a_rank(rank: int, world_size: int, folder: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    batch = ["--linear_batch_size", 32 // world_size, "--semisup_batch_size", 32 // world_size]
    start(Path(folder), "--pretrained", Path(folder).parent / "own.pth.tar", "--protocols", *PROTOCOLS, *batch)
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    own_checkpoint(tmp_path / "own.pth.tar")
    script_on_a_rank(0, 1, str(tmp_path / "1"))
    run_ranks(script_on_a_rank, 2, str(tmp_path / "2"))
    one, two = (json.loads((tmp_path / n / "table.json").read_text())["rows"]["own"] for n in "12")
    assert list(one) == COLUMNS and two == pytest.approx(one, abs=0.7)  # fine-tuning amplifies the last bits
    assert {key: two[key] for key in COLUMNS[:-1]} == {key: one[key] for key in COLUMNS[:-1]}
