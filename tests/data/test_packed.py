"""Packed images that are damaged: told in one line, mended by the same command, and no more than is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clusterssl.data import Loader, MultiCrop, open_source
from clusterssl.data.pack import pack
from clusterssl.data.packed import PackedSource, read_index
from clusterssl.errors import UserError
from tests.data.conftest import FIVE


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


def damage(shard: Path, how: str) -> None:
    data = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(data[:700])
    else:
        data[700] ^= 1
        shard.write_bytes(data)


@pytest.mark.parametrize("how", ["damaged", "truncated", "missing"])
def test_the_same_command_mends_one_shard_and_leaves_the_others(
    tree: Path, packed: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    before, whole = contents(packed), packed / "000000.tar"
    places = [array.tobytes() for array in read_index(packed).values()]
    written = whole.stat().st_mtime_ns
    damage(packed / "000001.tar", how)
    with caplog.at_level("INFO"):
        pack(tree, packed, FIVE)
    told = "missing" if how == "missing" else "damaged"
    assert f"000001.tar: {told}, is written anew" in caplog.text and "1 of 3 shards to write" in caplog.text
    assert contents(packed) == before and whole.stat().st_mtime_ns == written
    assert [array.tobytes() for array in read_index(packed).values()] == places
    assert torch.equal(PackedSource(packed).load(7), open_source(str(tree)).load(7))
    caplog.clear()
    with caplog.at_level("INFO"):
        pack(tree, packed, FIVE)
    assert "12 images in 3 shards, all as written" in caplog.text


def test_mending_that_is_killed_goes_on(tree: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(packed)
    damage(packed / "000001.tar", "truncated")
    with monkeypatch.context() as patched:
        patched.setattr("clusterssl.data.pack.done_by", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(tree, packed, FIVE)
    with pytest.raises(UserError, match="packing was not finished"):
        open_source(str(packed))
    (packed / "000000.tar.json").write_text("torn")
    pack(tree, packed, FIVE)
    assert contents(packed) == before


@pytest.mark.parametrize("content", [None, b"", b"junk", b"PK\x03\x04junk", "flipped", "other"])
def test_an_index_is_compared_and_written_anew(
    tree: Path, packed: Path, content: bytes | str | None, caplog: pytest.LogCaptureFixture
) -> None:
    before, index = contents(packed), packed / "index.npz"
    arrays = read_index(packed)
    if content == "flipped":
        data = bytearray(index.read_bytes())
        data[200] ^= 1
        index.write_bytes(data)
    elif content == "other":
        np.savez(index, **{**arrays, "offset": arrays["offset"] + 512})
    elif isinstance(content, bytes):
        index.write_bytes(content)
    else:
        index.unlink()
    if content != "other":
        with pytest.raises(UserError, match=r"index\.npz: (missing|damaged); run the same .* again") as raised:
            open_source(str(packed))
        assert "pickle" not in str(raised.value)
    with caplog.at_level("INFO"):
        pack(tree, packed, FIVE)
    assert "0 of 3 shards to write" in caplog.text and "all as written" not in caplog.text
    assert contents(packed) == before
    assert all(np.array_equal(array, arrays[name]) for name, array in read_index(packed).items())


@pytest.mark.parametrize("junk", ["junk", "[]", "{}", ""])
def test_a_damaged_record_is_one_line_with_a_remedy_that_works(tree: Path, packed: Path, junk: str) -> None:
    before = contents(packed)
    (packed / "pack.json").write_text(junk)
    for use in (lambda: pack(tree, packed, FIVE), lambda: open_source(str(packed))):
        with pytest.raises(UserError, match=r"pack\.json: damaged; remove it and run the same"):
            use()
    (packed / "pack.json").unlink()
    with pytest.raises(UserError, match="packing was not finished"):
        open_source(str(packed))
    pack(tree, packed, FIVE)
    assert contents(packed) == before


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_training_names_the_shard_once(packed: Path, how: str) -> None:
    opened = PackedSource(packed)
    opened.load(0)
    damage(packed / "000001.tar", how)
    told = rf"000001\.tar: {how}; run the same python -m clusterssl\.data\.pack again, which writes this shard anew"
    with pytest.raises(UserError, match=told):
        PackedSource(packed)
    assert len(PackedSource(packed, limit=5)) == 5, "of whole shards"
    for workers in (0, 1):
        loader = Loader(opened, MultiCrop((2,), (24,), (0.3,), (1.0,)), batch_size=3, workers=workers, seed=5)
        with pytest.raises(UserError, match=r"000001\.tar: .*which writes this shard anew"):
            list(loader.epoch(0))
