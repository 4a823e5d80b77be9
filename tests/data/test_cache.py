"""Small images are decoded once."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl import dist, room
from clusterssl.data import BadImageError, Loader, MultiCrop, fingerprint, open_source
from clusterssl.data import cache as module
from clusterssl.data.cache import CachedFiles, CachedSource
from clusterssl.data.pack import PackOptions, pack
from clusterssl.errors import UserError
from tests.ranks import run_ranks


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


def test_none_keeps_nothing(small: Path) -> None:
    source = open_source(str(small), cache="none")
    source.load(1)
    (small / "1.png").unlink()
    with pytest.raises(BadImageError):
        source.load(1)


@pytest.mark.parametrize("packed", [False, True])
def test_ram_keeps_the_files_of_large_images_for_all_workers(packed: bool, tree: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (9, 8, 7)).save(tree / "cat" / "0.png")
    (tree / "dog" / "broken.png").write_bytes(b"broken")
    path, images = tree, 13
    if packed:
        pack(tree, tmp_path / "packed", PackOptions(workers=1))
        path = tmp_path / "packed"
    source, plain = open_source(str(path), cache="ram"), open_source(str(path), cache="none")
    assert isinstance(source, CachedFiles) and fingerprint(source) == fingerprint(plain)
    crops = MultiCrop((2,), (16,))
    list(Loader(source, crops, batch_size=images, workers=2).epoch(0))
    expected = [None if "broken" in plain.name(i) else plain.load(i) for i in range(images)]
    expected_batch = next(Loader(plain, crops, batch_size=images).epoch(1))[0]
    shutil.rmtree(path)
    for i, image in enumerate(expected):
        if image is None:
            with pytest.raises(BadImageError, match="not an image"):
                source.load(i)
        else:
            assert torch.equal(source.load(i), image)
    batch = next(Loader(source, crops, batch_size=images, workers=2).epoch(1))[0]
    assert torch.equal(batch.crops[0], expected_batch.crops[0]) and len(batch.bad) == 1


@pytest.mark.parametrize("large", [False, True])
def test_disk_keeps_all_for_workers_and_leaves_nothing_behind(
    large: bool, small: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        Image.effect_noise((300, 200), 50).save(small / "1.png")
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    plain, source = open_source(str(small), cache="none"), open_source(str(small), cache="disk")
    assert isinstance(source, CachedFiles if large else CachedSource) and not list(scratch.iterdir())
    crops = MultiCrop((2,), (16,))
    expected_batch = next(Loader(plain, crops, batch_size=9).epoch(1))[0]
    list(Loader(source, crops, batch_size=9, workers=2).epoch(0))
    expected = {i: plain.load(i) for i in range(1, 8)}
    assert torch.equal(pickle.loads(pickle.dumps(source)).load(2), expected[2]), "elsewhere it reads the files"
    for i in expected:
        (small / f"{i}.png").unlink()
    assert all(torch.equal(source.load(i), image) for i, image in expected.items())
    assert torch.equal(
        next(Loader(source, crops, batch_size=9, workers=2).epoch(1))[0].crops[0], expected_batch.crops[0]
    )


def a_ranks_disk(rank: int, world_size: int, folder: str, scratch: str) -> bool:
    """Rank 0 reads an image and removes the file; whether the other has it then."""
    tempfile.tempdir = scratch
    source = open_source(folder, cache="disk")
    expected = open_source(folder, cache="none").load(3)
    dist.barrier()
    if rank == 0:
        source.load(3)
        (Path(folder) / "3.png").unlink()
    dist.barrier()
    return torch.equal(source.load(3), expected) and not list(Path(scratch).iterdir())


def test_ranks_of_a_machine_share_its_disk(small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert run_ranks(a_ranks_disk, 2, str(small), str(tmp_path_factory.mktemp("scratch"))) == [True, True]


def test_a_full_disk_is_said_before_training(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"--cache disk: .* cannot hold .* \(No space left on device\); let TMPDIR"):
        open_source(str(small), cache="disk")


def test_ram_travels_empty(tree: Path) -> None:
    Image.new("RGB", (300, 200)).save(tree / "cat" / "0.png")
    source = open_source(str(tree), cache="ram")
    assert torch.equal(pickle.loads(pickle.dumps(source)).load(2), source.load(2))


def test_ram_keeps_small_images_beyond_the_limit_of_auto(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert not isinstance(open_source(str(small)), CachedSource)
    assert isinstance(open_source(str(small), cache="ram"), CachedSource)


@pytest.mark.parametrize("large", [False, True])
def test_ram_is_refused_where_it_does_not_fit(large: bool, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        Image.effect_noise((300, 200), 50).save(small / "1.png")
    monkeypatch.setattr(room, "free_bytes", lambda: 2000.0)
    with pytest.raises(UserError, match="--cache ram: a rank needs"):
        open_source(str(small), cache="ram")
