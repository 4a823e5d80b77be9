"""Labelled subsets: shares of every class, lists of names, and what is wrong with a list."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl.data import open_source
from clusterssl.errors import UserError
from clusterssl.evals import subsets
from clusterssl.evals.subsets import LabelOptions, labelled, stratified


def test_a_share_of_every_class_nested_and_seeded() -> None:
    labels = np.repeat([0, 1, 2, -1], [200, 100, 7, 50])
    one, ten = stratified(labels, 1, seed=3), stratified(labels, 10, seed=3)
    assert np.bincount(labels[one]).tolist() == [2, 1, 1]
    assert np.bincount(labels[ten]).tolist() == [20, 10, 1]
    assert set(one) < set(ten) and (np.diff(ten) > 0).all()
    assert stratified(labels, 100, seed=3).tolist() == list(range(307))
    assert stratified(labels, 10, seed=4).tolist() != ten.tolist()
    assert stratified(labels, 10, seed=3).tolist() == ten.tolist()


def test_draws_have_no_favourites() -> None:
    labels = np.zeros(100, dtype=int)
    times = np.bincount(np.concatenate([stratified(labels, 10, seed) for seed in range(300)]), minlength=100)
    assert times.min() > 10 and times.max() < 60  # 30 each on average


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ant/a_0.png", "ant/a_1.png", "ant/x.png", "bee/b_0.png", "bee/x.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name)
    return tmp_path


def test_lists_of_names(folder: Path) -> None:
    source = open_source(str(folder / "train"))
    path = folder / "list.txt"
    path.write_text("b_0.png\n\n./ant/x.png\r\na_0.png\na_0.png\n")
    found = labelled(source, 10, str(path), seed=0)
    assert [Path(source.name(i)).name for i in found] == ["a_0.png", "x.png", "b_0.png"]
    assert LabelOptions(label_list=str(path)).choose(source, 0).tolist() == found.tolist()
    assert LabelOptions().choose(source, 0) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a_0.png\nb_7.png\nc.png\n", r"2 of 3 names are no training images \(first: b_7.png\)"),
        ("x.png\n", "x.png names 2 images; write class/x.png"),
        ("\n", "names no images"),
    ],
)
def test_lists_that_do_not_fit(folder: Path, text: str, message: str) -> None:
    (folder / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        labelled(open_source(str(folder / "train")), 1, str(folder / "list.txt"), seed=0)


def test_a_list_that_is_not_there(folder: Path) -> None:
    for name in ("nowhere.txt", "train"):
        with pytest.raises(UserError, match=r"--label_list .* cannot be read"):
            labelled(open_source(str(folder / "train")), 1, str(folder / name), seed=0)
    with pytest.raises(UserError, match="--label_subset 0"):
        LabelOptions(label_subset=0)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_published_list_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "1percent.txt").write_text("a_1.png\n")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    source = open_source(str(folder / "train"))
    with served(folder) as address:
        monkeypatch.setattr(subsets, "PUBLISHED", address + "/{percent:g}percent.txt")
        assert labelled(source, 1.0, "published", seed=0).tolist() == [1]
        with pytest.raises(UserError, match=r"10percent\.txt: HTTP 404"):
            labelled(source, 10.0, "published", seed=0)
        with pytest.raises(UserError, match="published: exists for 1 and 10 percent, not for 5"):
            labelled(source, 5.0, "published", seed=0)
    assert "imagenet_subsets/10percent.txt" in LABEL_ADDRESS


LABEL_ADDRESS = subsets.PUBLISHED.format(percent=10.0)
