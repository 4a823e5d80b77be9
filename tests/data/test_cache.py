"""Small images are decoded once."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl.data import BadImageError, Loader, MultiCrop, open_source
from clusterssl.data.cache import CachedSource


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Eight 16 x 16 pictures, one of another size, one broken first."""
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / "8.png")
    (tmp_path / "0.png").write_bytes(b"broken")
    return tmp_path


def test_files_are_read_once(small: Path) -> None:
    source = open_source(str(small))
    assert isinstance(source, CachedSource)
    first = [source.load(i).clone() for i in range(1, 9)]
    for i in range(1, 8):
        (small / f"{i}.png").unlink()
    for i in range(1, 9):
        assert torch.equal(source.load(i), first[i - 1])
    with pytest.raises(BadImageError):
        source.load(0)


def test_workers_share_it(small: Path) -> None:
    source = open_source(str(small))
    loader = Loader(source, MultiCrop((2,), (16,)), batch_size=3, workers=2)
    before = [step[0].crops[0].clone() for step in loader.epoch(0)]
    for i in range(1, 8):
        (small / f"{i}.png").unlink()
    after = [step[0].crops[0] for step in loader.epoch(0)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert source.load(3).shape == (3, 16, 16)


def test_survives_pickling(small: Path) -> None:
    source = open_source(str(small))
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.load(2), source.load(2)) and copy.name(2) == source.name(2)


def test_large_images_are_not_kept(tree: Path) -> None:
    Image.new("RGB", (300, 200)).save(tree / "cat" / "0.png")
    assert not isinstance(open_source(str(tree)), CachedSource)
