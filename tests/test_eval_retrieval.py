"""The script eval_retrieval.py from command line to record, alone and on two ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import eval_retrieval
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.errors import UserError
from clusterssl.evals.groundtruth import GroundTruth
from clusterssl.evals.retrieval import Benchmark, Describer, RetrievalOptions, Whole, ranked
from clusterssl.models.build import build_backbone
from clusterssl.models.trunks import alexnet
from tests.evals.logs import records, restored_logger  # noqa: F401
from tests.evals.voc import unpacked
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def run(folder: Path, *words: object) -> int:
    """Exit code of the script."""
    sys.argv = ["eval_retrieval.py", "--dump_path", str(folder), *map(str, words)]
    with pytest.raises(SystemExit) as end:
        cfg.entry(eval_retrieval.main)
    return int(end.value.code or 0)


def colours(root: Path, revisited: bool = True) -> Path:
    """Four objects in three photos each: squares of one colour; queries show a small one of them at the left."""
    (root / "jpg").mkdir(parents=True)
    random, names = np.random.default_rng(0), []
    palette = [(220, 30, 30), (30, 200, 40), (40, 60, 220), (210, 200, 30)]
    for thing, colour in enumerate(palette):
        for photo in range(4):
            pixels = random.integers(90, 120, (40, 60, 3), dtype=np.uint8)
            pixels[4:36, 4 : 14 if photo == 3 else 34] = colour
            if photo == 3:  # the query: another object fills the rest
                pixels[:, 24:] = palette[(thing + 1) % 4]
            names.append(f"thing{thing}_{photo}")
            Image.fromarray(pixels).save(root / "jpg" / f"{names[-1]}.png")
    database, queries = [n for n in names if n[-1] != "3"], [n for n in names if n[-1] == "3"]
    easy = [[i for i, n in enumerate(database) if n.startswith(q[:6])] for q in queries]
    boxes = [[2, 2, 18, 38]] * 4
    entries = [{"bbx": b, "easy": e[:2], "hard": e[2:], "junk": []} for b, e in zip(boxes, easy, strict=True)]
    if revisited:
        content = {"imlist": database, "qimlist": queries, "gnd": entries}
        (root / "gnd_colours.json").write_text(json.dumps(content))
        return root
    (root / "gt").mkdir()
    for query, members in zip(queries, easy, strict=True):
        stem = f"gt/{query[:6]}_1"
        (root / f"{stem}_query.txt").write_text(f"oxc1_{query} 2 2 18 38\n")
        (root / f"{stem}_good.txt").write_text(f"{query}\n{database[members[0]]}\n")
        (root / f"{stem}_ok.txt").write_text("\n".join(database[i] for i in members[1:]))
        (root / f"{stem}_junk.txt").write_text("")
    return root


TINY = ["--arch", "conv4w8", "--S", "60", "--workers", "0", "--device", "cpu"]


def test_colours_are_found_and_boxes_matter(tmp_path: Path) -> None:
    flags = [*TINY, "--data_path", colours(tmp_path / "colours"), "--pooling", "avg"]
    assert run(tmp_path, *flags) == 0
    assert run(tmp_path, *flags, "--boxes", "false") == 0
    cut, whole = records(tmp_path)
    assert cut["eval"] == "retrieval" and cut["map_medium"] > 85 and cut["mp1_medium"] > 90
    assert whole["map_medium"] < cut["map_medium"] - 10, "the other object fills most of the query image"


def test_original_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = colours(tmp_path / "old", revisited=False)
    assert run(tmp_path, *TINY, "--data_path", folder, "--pooling", "avg", "--boxes", "false") == 0
    (record,) = records(tmp_path)
    assert record["mp1"] == 100, "the query itself is in the database, and good"
    assert "old: 4 queries, 16 images" in capsys.readouterr().out


def test_the_real_mini_set(tmp_path: Path) -> None:
    folder = unpacked("retrieval", tmp_path) / "rmini"
    others = colours(tmp_path / "others")
    flags = [*TINY, "--data_path", folder, "--S", 128, "--whiten_on", others, "--n_pca", 8, "--scales", 1, 0.5]
    for pooling in ("rmac", "gem"):
        assert run(tmp_path, *flags, "--pooling", pooling) == 0
    rmac, gem = records(tmp_path)
    assert 10 < rmac["map_medium"] < 100 and 10 < gem["map_medium"] < 100
    assert rmac["n_pca"] == 8 and set(rmac) >= {f"mp{k}_{level}" for k in (1, 5, 10) for level in ("easy", "hard")}


def on_a_rank(rank: int, world_size: int, data: str, out: str) -> None:
    left, dist.leave = dist.leave, lambda: None  # the test's own process group ends later
    for pooling in ("rmac", "gem"):
        flags = [*TINY, "--data_path", data, "--pooling", pooling, "--whiten_on", f"{data}/../other", "--n_pca", 6]
        assert run(Path(out), *flags) == 0
    dist.leave = left


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    data = str(colours(tmp_path / "data"))
    colours(tmp_path / "other", revisited=False)
    on_a_rank(0, 1, data, str(tmp_path / "1"))
    run_ranks(on_a_rank, 2, data, str(tmp_path / "2"))
    one, two = ([{**record, "time": 0} for record in records(tmp_path / n)] for n in "12")
    assert one == two and len(one) == 2


def test_whole_images_and_boxes_are_scaled_and_rounded(tmp_path: Path) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 33, 50), dtype=np.uint8))
    smooth = TF.gaussian_blur(pixels, 7, 3)
    view = Whole(100, (None, (10.2, 5.1, 30.4, 20.7)))
    whole, part = view(smooth, 0, 0)[0], view(smooth, 0, 1)[0]
    assert whole.shape == (3, 66, 100)
    expected = TF.resize(smooth, [66, 100], antialias=True)
    assert (whole.int() - expected.int()).abs().max() <= 1
    assert torch.equal(part, whole[:, 10:41, 20:61])
    outside = Whole(100, ((-5.0, -5, 80, 60), (60, 40, 70, 50)))
    assert outside(smooth, 0, 0).shape == (1, 3, 66, 100) and outside(smooth, 0, 1).shape == (1, 3, 1, 1)


def test_scales_are_put_together() -> None:
    net, image = build_backbone("conv4w4", "small"), torch.randn(1, 3, 48, 64)
    one, half = (Describer(net, RetrievalOptions(pooling="gem", scales=s), CPU, (1, 1, 1)) for s in ((1.0,), (0.5,)))
    both = Describer(net, RetrievalOptions(pooling="gem", scales=(1.0, 0.5)), CPU, (1, 1, 1)).vectors(image)
    torch.testing.assert_close(both, torch.nn.functional.normalize(one.vectors(image) + half.vectors(image), dim=1))
    regions = Describer(net, RetrievalOptions(scales=(1.0, 0.5)), CPU, (1, 1, 1)).vectors(image)
    assert len(regions) == 2 * len(Describer(net, RetrievalOptions(), CPU, (1, 1, 1)).vectors(image))


def test_alexnet_goes_without_its_last_pooling() -> None:
    net = alexnet((4, 4, 4, 4, 5)).eval()
    describer = Describer(net, RetrievalOptions(), CPU, (1, 1, 1))
    image = torch.randn(1, 3, 128, 160)
    assert describer.features == 5 and describer._map(image).shape == (1, 5, 7, 9)
    torch.testing.assert_close(torch.nn.functional.max_pool2d(describer._map(image), 3, 2), net.forward_map(image))


def test_ranking_is_by_product_and_stable() -> None:
    database = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0]])
    assert ranked(torch.tensor([[1.0, 0], [0, -1]]), database).tolist() == [[0, 2, 1, 3], [0, 2, 3, 1]]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = colours(tmp_path / "good")
    lacking = tmp_path / "lacking"
    shutil.copytree(good, lacking)
    (lacking / "jpg" / "thing0_1.png").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    shutil.copy(good / "jpg" / "thing0_0.png", tmp_path / "plain" / "a.png")
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    (broken / "jpg" / "thing2_0.png").write_bytes(b"no image")
    flags = [*TINY, "--data_path"]
    for words, message in (
        (TINY, "--data_path: name the folder"),
        ([*flags, tmp_path / "none"], "no such folder"),
        ([*flags, tmp_path / "empty"], "no images below it; expected them in jpg/"),
        ([*flags, tmp_path / "plain"], "holds a.png; expected one gnd_<name>.pkl"),
        ([*flags, lacking], "1 of 16 images of the ground truth are missing, thing0_1 first; found 15"),
        ([*flags, broken], "thing2_0.png"),
        ([*flags, good, "--whiten_on", good], "is what is evaluated"),
        ([*flags, good, "--whiten_on", tmp_path / "plain"], "--n_pca 512"),
        ([*flags, good, "--whiten_on", tmp_path / "empty"], "no images below it"),
        ([*flags, good, "--arch", "vit_tiny"], "gives no feature map"),
        ([*flags, good, "--S", 0], "--S 0"),
        ([*flags, good, "--pooling", "max"], "--pooling"),
        ([*flags, good, "--S", 4], "too small"),
    ):
        assert run(tmp_path / "out", *words) == 2, message
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error, error
    assert not (tmp_path / "out").exists()


def test_several_ground_truths_are_refused(tmp_path: Path) -> None:
    folder = colours(tmp_path / "two")
    assert isinstance(Benchmark(str(folder)).truth, GroundTruth)
    shutil.copy(folder / "gnd_colours.json", folder / "gnd_more.json")
    with pytest.raises(UserError, match=r"holds gnd_colours.json, gnd_more.json, jpg; expected one gnd_<name>\.pkl"):
        Benchmark(str(folder))
