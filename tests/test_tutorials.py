"""The commands of the tutorial, read from its text, on a folder of small photographs that code makes."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    "main_swav.py": "--epochs 2 --warmup_epochs 0 --batch_size 8 --workers 0 --device cpu --nmb_prototypes 8",
    "assign.py": "--workers 0 --device cpu --batch_size 8",
}
"""flags that make each command one of seconds; the last of two equal flags counts"""


def commands() -> list[list[str]]:
    """Words of every command of the tutorial's shell blocks."""
    text = (ROOT / "docs" / "TUTORIAL_OWN_IMAGES.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def photographs(folder: Path, number: int = 24) -> None:
    """JPEGs of several sizes: a bright disc or bar before a gradient."""
    draws = np.random.default_rng(0)
    for at in range(number):
        height, width = draws.integers(140, 200, 2)
        y, x = np.mgrid[:height, :width]
        disc = np.hypot(y - height * draws.uniform(0.3, 0.7), x - width * draws.uniform(0.3, 0.7)) < height / 4
        bar = np.abs(x - width * draws.uniform(0.3, 0.7)) < width / 8
        grey = 120.0 * y / height + 100 * (disc if at % 2 else bar)
        picture = np.stack([grey, grey * 0.8, 255 - grey], axis=2) + draws.normal(0, 8, (height, width, 3))
        path = folder / ("one" if at % 3 else "two") / f"{at}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)


def test_the_tutorial_has_its_three_commands() -> None:
    scripts = [words[1] for words in commands()]
    assert all(words[0] == "python" for words in commands())
    assert [name for name in scripts if name != "main_swav.py"][:2] == ["report.py", "assign.py"]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    photographs(tmp_path / "val")
    told = commands()
    with_gpu, _ = (words for words in told if words[1] == "main_swav.py")
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "photos").symlink_to(tmp_path / "photos")
    for words in told:
        where = tmp_path / "gpu" if words is with_gpu else tmp_path
        line = [sys.executable, str(ROOT / words[1]), *words[2:], *shlex.split(SHORTER.get(words[1], ""))]
        if "--k" in line:
            line[line.index("--k") + 1] = "4"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=where, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs/photos/report.html").stat().st_size > 10_000
    for name in ("labels.csv", "clusters.html", "duplicates.csv", "outliers.csv"):
        assert (tmp_path / "labels" / name).is_file(), name
    with (tmp_path / "labels" / "labels.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    assert len(list((tmp_path / "labels20" / "clusters").glob("*/*"))) == 24
