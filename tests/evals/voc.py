"""VOCdevkit folders for tests: the real subset, or a tiny one written here."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ball", "cup", "tree")


def unpacked(name: str, target: Path) -> Path:
    """The real data of that name, or a visible skip."""
    folder = os.environ.get("CLUSTERSSL_DATA", "")
    archive = Path(folder) / f"{name}.tar"
    if not folder or not archive.is_file():
        pytest.skip(f"needs real data: set CLUSTERSSL_DATA to the folder of {name}.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target


def tiny_voc(root: Path, sizes: dict[str, int] | None = None, year: str = "VOC2007", seed: int = 0) -> Path:
    """Images whose classes are coloured squares: red ball, green cup, blue tree; one or two of them each."""
    folder = root / "VOCdevkit" / year
    for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True)
    random, number = np.random.default_rng(seed), 0
    for split, size in (sizes or {"trainval": 24, "test": 15}).items():
        rows: dict[str, list[str]] = {name: [] for name in CLASSES}
        names = []
        for i in range(size):
            names.append(f"{number:06}")
            shown = {i % 3, int(random.integers(3))}
            _draw(folder, names[-1], shown, random)
            for c, name in enumerate(CLASSES):
                rows[name].append(f"{names[-1]} {1 if c in shown else -1:2}")
            number += 1
        for name in CLASSES:
            (folder / "ImageSets/Main" / f"{name}_{split}.txt").write_text("\n".join(rows[name]) + "\n")
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def _draw(folder: Path, name: str, shown: set[int], random: np.random.Generator) -> None:
    pixels = random.integers(100, 140, (48, 64, 3), dtype=np.uint8)
    objects = []
    for c in sorted(shown):
        left, top = int(random.integers(0, 40)), int(random.integers(0, 24))
        pixels[top : top + 24, left : left + 24] = 20
        pixels[top : top + 24, left : left + 24, c] = 240
        box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + 24}</xmax><ymax>{top + 24}</ymax>"
        objects.append(f"<object><name>{CLASSES[c]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>")
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
