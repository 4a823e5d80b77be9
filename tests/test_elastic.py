"""One run on 1, 2, 4 and again 1 rank: in float64 its losses are those of the run that never moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterssl.files import read_checkpoint
from tests.launch import ROOT, TINY, Launched, metrics

GLOBAL_BATCH, PER_EPOCH, LAST = 16, 6, 30
"""4 of the 100 images are in no step of an epoch"""
MOVES = ((1, 8), (2, 5), (4, 5), (1, 0))
"""ranks, and steps after which they are told to stop; several ranks do so one step later"""
RUN = ["--data_path", "synthetic:100:24x24", "--workers", "0", "--log_freq", "1", "--device", "cpu", "--epochs", "5"]
VIEWS = ["--nmb_crops", "2", "--size_crops", "16", "--min_scale_crops", "0.4", "--max_scale_crops", "1"]
ONE_CROP = ["--arch", "conv4w4", "--size_crops", "16", "--base_lr", "0.05", *RUN]
METHODS = {
    "swav": ("main_swav.py", [*TINY, *RUN, "--queue_length", "32", "--epoch_queue_starts", "1"]),
    "deepclusterv2": ("main_deepclusterv2.py", [*TINY, *RUN, "--nmb_prototypes", "12", "9", "5"]),
    "sela": ("main_sela.py", [*TINY, *RUN, "--nmb_prototypes", "12", "9", "5", "--label_clusters", "3"]),
    "sela_v1": ("main_sela.py", ["--version", "1", *ONE_CROP, "--hc", "2", "--ncl", "6", "--nopts", "7"]),
    "deepcluster": ("main_deepcluster.py", [*ONE_CROP, "--nmb_cluster", "6"]),
    "selfclassifier": ("main_selfclassifier.py", [
        *VIEWS, "--arch", "conv4w4", "--hidden_mlp", "16", "--feat_dim", "8", "--base_lr", "0.5",
        "--warmup_epochs", "1", "--start_warmup", "0", "--cls_size", "6", "5", "--queue_len", "40", *RUN,
    ]),
}  # fmt: skip


def launch(name: str, folder: Path, ranks: int, steps: int) -> Path:
    """Start or go on; returns the beginning of the names of the ranks' lists of images."""
    script, flags = METHODS[name]
    images = folder.with_name(f"{folder.name}.{len(list(folder.parent.iterdir()))}")
    size = ["--batch_size", str(GLOBAL_BATCH // ranks), "--dump_path", str(folder)]
    words = [str(steps), str(images), str(ROOT / script), *flags, *size]
    codes, printed = Launched("tests/in_double.py", *words, ranks=ranks).wait()
    assert codes == [75 if steps else 0] * ranks, printed
    return images


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}


def global_batches(images: Path, ranks: int) -> list[list[int]]:
    """Dataset positions of each step, the ranks' shares in rank order."""
    lists = [Path(f"{images}.{rank}").read_text().splitlines() for rank in range(ranks)]
    assert len({len(rows) for rows in lists}) == 1
    return [[int(word) for row in rows for word in row.split()] for rows in zip(*lists, strict=True)]


IN_SECONDS = ("swav", "deepclusterv2")
"""in the default tests"""


@pytest.mark.parametrize("name", [pytest.param(m, marks=() if m in IN_SECONDS else pytest.mark.slow) for m in METHODS])
def test_on_1_2_4_1_ranks_trains_as_on_one(name: str, tmp_path: Path) -> None:
    whole = global_batches(launch(name, tmp_path / "whole", 1, 0), 1)
    moved, seen, stops = tmp_path / "moved", [], []
    for ranks, steps in MOVES:
        seen += global_batches(launch(name, moved, ranks, steps), ranks)
        state = read_checkpoint(moved / "checkpoint.pth.tar")
        stops.append(state["step"])
        if name == "swav":
            assert min(state["method_state"]["filled"]) >= 2, "the queue was to be full"
    assert stops == [8, 14, 20, LAST] and all(stop % PER_EPOCH for stop in stops[:-1])
    assert seen == whole and len(whole) == LAST and len(set(map(tuple, whole))) == LAST
    expected, ours = losses(tmp_path / "whole"), losses(moved)
    assert list(expected) == list(ours) == list(range(1, LAST + 1))
    assert max(abs(ours[step] - expected[step]) for step in expected) < 1e-9
