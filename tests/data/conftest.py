"""Images for the tests of the data path."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clusterssl.data.pack import PackOptions, pack

_COUNT = 16
FIVE = PackOptions(shard_images=5, workers=1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixteen ImageNet JPEGs."""
    folder = os.environ.get("CLUSTERSSL_DATA", "")
    archive = Path(folder) / "imagenet-sample.tar"
    if not folder or not archive.is_file():
        pytest.skip("needs real photos: set CLUSTERSSL_DATA to the folder of imagenet-sample.tar")
    target = tmp_path_factory.mktemp("photos")
    paths = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith((".jpeg", ".jpg")):
                content = tar.extractfile(member)
                assert content is not None
                paths.append(target / Path(member.name).name)
                paths[-1].write_bytes(content.read())
            if len(paths) == _COUNT:
                break
    return paths


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three class folders of four PNGs each, of different sizes, one folder nested."""
    rng = np.random.default_rng(0)
    for c, inner in enumerate(("cat", "dog/small", "eel")):
        folder = tmp_path / "tree" / inner
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (40 + 10 * c, 50 + 3 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "tree"


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> Path:
    """The twelve pictures of `tree` in three shards."""
    pack(tree, tmp_path / "packed", FIVE)
    return tmp_path / "packed"
