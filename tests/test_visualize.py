"""The script visualize.py: pictures and one page, with and without images, heads and checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from clusterssl.errors import UserError
from clusterssl.insight.answers import filter_pictures
from clusterssl.models.weights import backbone_from_weights
from tests.evals.checkpoints import own_checkpoint
from tests.evals.logs import restored_logger  # noqa: F401
from tests.report.test_page import page_of


def run(out: Path, *words: object) -> set[str]:
    """Names of what a command writes."""
    sys.argv = ["visualize.py", "--out", str(out), "--niter", "3", "--device", "cpu", *map(str, words)]
    visualize.main()
    return {path.name for path in out.iterdir()}


@pytest.mark.parametrize("heads", [(), (12, 7)], ids=["prototypes", "heads"])
def test_everything_of_a_run(tmp_path: Path, heads: tuple[int, ...]) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar", heads=heads)
    words = ["--pretrained", checkpoint, "--images", "digits", "--layers", "conv1", "conv4", "--filters", 4]
    found = run(tmp_path / "out", *words, "--cls_num", len(heads) // 2)
    pictures = {"first-filters", "ascent-conv1", "ascent-conv4", "images-conv1", "images-conv4", "images-clusters"}
    assert found == {"visualize.html", "attention.png", *(f"{name}.png" for name in pictures)}
    page = page_of(tmp_path / "out" / "visualize.html")
    assert page.count("img") == 1 + 8 + 3 * 4 + 4 + 4
    text = " ".join(page.texts)
    assert text.count("began as noise and was changed in 3 small steps") == 2
    assert text.count("to noise, ") == 2 * 4, "captions say what their numbers are"
    for tag, attributes in page.tags:
        value = attributes.get("src") or "data:image/"
        assert value.startswith("data:image/"), f"{tag} loads {value[:50]}"
    assert (tmp_path / "out" / "visualize.html").stat().st_size < 2_000_000


def test_first_filters_of_the_file_are_those_of_the_network(tmp_path: Path) -> None:
    checkpoint = own_checkpoint(tmp_path / "own.pth.tar")
    assert run(tmp_path / "out", "--pretrained", checkpoint) == {
        "visualize.html",
        "first-filters.png",
        "ascent-conv4.png",
    }
    shown = filter_pictures(backbone_from_weights(str(checkpoint)).conv1.weight.detach().numpy())
    sheet = np.asarray(Image.open(tmp_path / "out" / "first-filters.png"))
    assert len(shown) == 8
    for at, image in enumerate(shown):
        left = 4 + at * 34 + 1
        expected = np.asarray(Image.fromarray(image).resize((32, 32)))
        assert (sheet[5:37, left : left + 32] == expected).all()


def test_networks_of_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = run(
        tmp_path / "out", "--arch", "mobilenet_v3_small", "--image_size", 32, "--images", "digits", "--filters", 2
    )
    assert "first-filters.png" in found and "images-clusters.png" not in found and len(found) == 4


def test_bad_input(tmp_path: Path) -> None:
    own = own_checkpoint(tmp_path / "own.pth.tar")
    (tmp_path / "file").write_text("x")
    for out, words, message in (
        ("out", ["--pretrained", tmp_path / "none.pth"], "no such checkpoint"),
        ("out", ["--pretrained", own, "--layers", "conv9"], "no such layer"),
        ("out", ["--pretrained", own, "--images", tmp_path / "none"], "does not exist"),
        ("out", ["--pretrained", own, "--cls_num", 2], "heads 0 to 0"),
        ("out", ["--pretrained", own, "--filters", 0], "--filters 0"),
        ("out", ["--pretrained", own, "--lr", 0], "--lr 0"),
        ("file", ["--pretrained", own], "cannot be written"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(tmp_path / out, *words)
        assert len(str(caught.value).splitlines()) == 1
