"""Ground truth files: the real ones, every form of them, and files that would run code."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterssl.errors import UserError
from clusterssl.evals.groundtruth import BROKEN, read_ground_truth, read_original, read_plain_pickle
from tests.evals.voc import unpacked

ENTRIES = [{"bbx": [1.5, 2, 30, 40], "easy": [0, 2], "hard": [1], "junk": [3]}, {"easy": [], "hard": [4], "junk": []}]
CONTENT = {"imlist": ["a", "b", "c", "d", "e"], "qimlist": ["p", "q"], "gnd": ENTRIES}


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("retrieval", tmp_path_factory.mktemp("retrieval"))


@pytest.mark.parametrize(("name", "images"), [("roxford5k", 4993), ("rparis6k", 6322)])
def test_the_real_revisited_files(retrieval: Path, name: str, images: int) -> None:
    path = retrieval / name / f"gnd_{name}.pkl"
    truth = read_ground_truth(path)
    assert len(truth.names) == images and len(truth.queries) == 70 and truth.protocol == "revisited"
    content = pickle.loads(path.read_bytes())  # a file known to hold no code
    for query, entry, name in zip(truth.queries, content["gnd"], content["qimlist"], strict=True):
        assert query.name == name and query.box == tuple(entry["bbx"])
        assert {key: list(positions) for key, positions in query.sets.items()} == {
            key: entry[key] for key in ("easy", "hard", "junk")
        }


def test_the_real_original_files(retrieval: Path) -> None:
    folder = retrieval / "oxford5k" / "gt"
    names = sorted({word for path in folder.glob("*_[!q]*.txt") for word in path.read_text().split()})
    truth = read_original(folder, names)
    assert len(truth.queries) == 55 and truth.protocol == "original"
    first = truth.queries[0]
    assert first.name == "all_souls_000013" and first.box == (136.5, 34.1, 648.5, 955.7)
    positive, skipped = truth.positives("all")[0]
    good, ok, junk = ((folder / f"all_souls_1_{key}.txt").read_text().split() for key in ("good", "ok", "junk"))
    assert [truth.names[i] for i in positive] == good + ok and [truth.names[i] for i in skipped] == junk
    with pytest.raises(UserError, match="which is none of the 3 images"):
        read_original(folder, names[:3])


def test_json_is_the_same_as_pickle(retrieval: Path) -> None:
    one, other = (read_ground_truth(retrieval / "rmini" / f"gnd_rmini.{kind}") for kind in ("pkl", "json"))
    assert one == other and len(one.queries) == 7 and len(one.names) == 41


def written(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_instead_of_lists(tmp_path: Path, protocol: int) -> None:
    kinds: list[Any] = [np.int64, np.int32, np.float64, ">i4", np.uint8]
    for kind in kinds:
        arrays = [{key: np.array(value, dtype=kind) for key, value in entry.items()} for entry in ENTRIES]
        arrays[0]["bbx"] = [np.float64(1.5), np.float32(2), 30, np.int64(40)]
        arrays[1]["hard"] = np.asfortranarray(np.array([[4]]))[0]
        path = written(tmp_path / "gnd.pkl", {**CONTENT, "gnd": arrays}, protocol)
        truth = read_ground_truth(path)
        assert truth.queries[0].box == (1.5, 2, 30, 40)
        assert truth.queries[0].sets == {"easy": (0, 2), "hard": (1,), "junk": (3,)}
        assert truth.queries[1].sets["hard"] == (4,) and truth.queries[1].box is None


def test_levels() -> None:
    truth = read_from(CONTENT)
    lists = {
        level: [(p.tolist(), s.tolist()) for p, s in truth.positives(level)] for level in ("easy", "medium", "hard")
    }
    assert lists == {
        "easy": [([0, 2], [1, 3]), ([], [4])],
        "medium": [([0, 2, 1], [3]), ([4], [])],
        "hard": [([1], [0, 2, 3]), ([4], [])],
    }


def read_from(content: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gnd.json").write_text(json.dumps(content))
        return read_ground_truth(Path(folder) / "gnd.json")


class Malicious:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_never_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "was-here"
    for bad in (
        Malicious(os.system, f"touch {trace}"),
        Malicious(open, str(trace), "w"),
        Malicious(eval, f"open({str(trace)!r}, 'w')"),
        Malicious(getattr, 1, "real"),
        np.array([Malicious(os.system, f"touch {trace}")], dtype=object),
        Path("x"),
    ):
        path = written(tmp_path / "gnd.pkl", {**CONTENT, "gnd": [bad]}, protocol)
        with pytest.raises(UserError, match="pickle"):
            read_plain_pickle(path)
    assert not trace.exists()


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    for content, message in (
        ({"images": []}, "expected imlist, qimlist and gnd"),
        ({**CONTENT, "qimlist": ["p"]}, "expected imlist"),
        ({**CONTENT, "gnd": [{"bbx": [1, 2, 3], "ok": [1]}, {"ok": []}]}, "expected imlist"),
        ({**CONTENT, "gnd": [], "qimlist": []}, "0 queries over 5 images; the ground truth is empty"),
        ({**CONTENT, "gnd": [{"easy": [7]}, {}]}, "query p counts on image 7 of 5"),
        ({**CONTENT, "gnd": [{"junk": [1]}, {}]}, "no query has a positive image"),
    ):
        with pytest.raises(UserError, match=message):
            read_from(content)
        with pytest.raises(UserError, match=message):
            read_ground_truth(written(tmp_path / "gnd.pkl", content))
    (tmp_path / "gnd.pkl").write_bytes(b"<html>")
    with pytest.raises(UserError, match="not readable as a pickle"):
        read_ground_truth(tmp_path / "gnd.pkl")
    with pytest.raises(UserError, match="No such file"):
        read_ground_truth(tmp_path / "none.json")
    with pytest.raises(UserError, match="0 queries"):
        read_original(tmp_path, ["a"])
    (tmp_path / "x_1_query.txt").write_text("oxc1_a 1 2 3 4\n")
    with pytest.raises(UserError, match="no query of Oxford or Paris with its lists"):
        read_original(tmp_path, ["a"])


def test_damaged_images_of_paris_are_left_out(tmp_path: Path) -> None:
    assert len(BROKEN) == 20 and "paris_louvre_000136" in BROKEN
    (tmp_path / "louvre_1_query.txt").write_text("paris_louvre_000001 1 2 3 4\n")
    for key, images in {"good": ["paris_louvre_000001", "paris_louvre_000136"], "ok": [], "junk": []}.items():
        (tmp_path / f"louvre_1_{key}.txt").write_text("\n".join(images))
    truth = read_original(tmp_path, ["paris_louvre_000001", "paris_louvre_000136"])
    assert truth.names == ["paris_louvre_000001"] and truth.queries[0].sets["ok"] == (0,)
