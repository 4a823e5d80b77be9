"""Packed images are the same images."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl.data import BadImageError, Loader, MultiCrop, fingerprint, open_source
from clusterssl.data.pack import PackOptions, main, pack
from clusterssl.data.packed import PackedSource
from clusterssl.errors import UserError
from tests.data.conftest import FIVE
from tests.forked import server
from tests.launch import ROOT, Launched


def test_same_images_names_labels_and_identity(tree: Path, packed: Path) -> None:
    folder, shards = open_source(str(tree)), PackedSource(packed)
    assert len(list(packed.glob("*.tar"))) == 3
    assert shards.classes == folder.classes and len(shards) == len(folder)
    np.testing.assert_array_equal(shards.labels, folder.labels)
    for i in range(len(folder)):
        assert Path(shards.name(i)).relative_to(packed) == Path(folder.name(i)).relative_to(tree)
        assert shards.read(i).tobytes() == Path(folder.name(i)).read_bytes()
        assert torch.equal(shards.load(i), folder.load(i))
    assert fingerprint(shards) == fingerprint(folder), "a run may go on with either"
    assert len(open_source(str(packed), limit=4)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_the_folders_bit_for_bit(tree: Path, packed: Path, workers: int) -> None:
    crops = MultiCrop((2, 1), (24, 12), (0.3, 0.1), (1.0, 0.3))
    loaders = [Loader(open_source(str(p)), crops, batch_size=3, workers=workers, seed=5) for p in (tree, packed)]
    for epoch in (0, 1):
        steps = list(zip(*(loader.epoch(epoch) for loader in loaders), strict=True))
        assert len(steps) == 4
        for (of_folder,), (of_shards,) in steps:
            assert torch.equal(of_folder.index, of_shards.index) and torch.equal(of_folder.params, of_shards.params)
            assert all(torch.equal(a, b) for a, b in zip(of_folder.crops, of_shards.crops, strict=True))


def test_webdataset_reads_it(tree: Path, packed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = open_source(str(tree))
    shards = sorted(str(path) for path in packed.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert [label for _, label in samples] == source.labels.tolist()
    for i, (pixels, _) in enumerate(samples):
        np.testing.assert_array_equal(pixels, source.load(i).permute(1, 2, 0).numpy())


def test_splits_flat_folders_and_lists(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "data" / "train")
    shutil.copytree(tree / "cat", tmp_path / "data" / "val" / "cat")
    pack(tmp_path / "data", tmp_path / "both", FIVE)
    assert len(open_source(str(tmp_path / "both"))) == 12
    assert len(open_source(str(tmp_path / "both"), split="val")) == 4
    pack(tree / "cat", tmp_path / "flat", FIVE)
    flat = open_source(str(tmp_path / "flat"))
    assert flat.classes == [] and flat.labels.tolist() == [-1] * 4
    with tarfile.open(tmp_path / "flat" / "000000.tar") as tar:
        assert tar.getnames() == [f"{i:09d}.png" for i in range(4)]
    (tmp_path / "list.txt").write_text(f"{tree}/cat/1.png\t7\n{tree}/eel/0.png\t9\n")
    pack(tmp_path / "list.txt", tmp_path / "listed", FIVE)
    listed = open_source(str(tmp_path / "listed"))
    assert listed.classes == ["7", "9"] and torch.equal(listed.load(1), open_source(str(tree)).load(8))


def test_small_packed_images_are_cached_and_travel(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "small" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, i, i)).save(path)
    pack(tmp_path / "small", tmp_path / "packed", FIVE)
    source = open_source(str(tmp_path / "packed"))
    assert fingerprint(source) == fingerprint(open_source(str(tmp_path / "small")))
    assert torch.equal(pickle.loads(pickle.dumps(source)).load(5), source.load(5))


def test_reencoded_at_a_short_side(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(gradient).save(folder / "0.png")
    Image.fromarray(gradient[:20, :30]).save(folder / "1.jpg")
    (folder / "2.jpg").write_bytes(b"no image")
    pack(tmp_path / "data", tmp_path / "packed", PackOptions(short_side=40, quality=95, workers=1))
    source = PackedSource(tmp_path / "packed")
    assert source.load(0).shape == (3, 40, 60)
    expected = np.asarray(Image.fromarray(gradient).resize((60, 40), Image.Resampling.BILINEAR))
    assert np.abs(source.load(0).permute(1, 2, 0).numpy().astype(int) - expected).mean() < 3
    assert source.read(1).tobytes() == (folder / "1.jpg").read_bytes()
    with pytest.raises(BadImageError, match="not an image"):
        source.load(2)
    with pytest.raises(UserError, match="short_side was 40, is 0"):
        pack(tmp_path / "data", tmp_path / "packed", PackOptions())


def slow_packing(source: str, target: str) -> None:
    from clusterssl.data import shards as module

    content = module._content
    module._content = lambda *args: (time.sleep(0.05), content(*args))[1]
    pack(source, target, FIVE)


def test_goes_on_where_it_was_killed(tree: Path, packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "killed"
    process = server().Process(target=slow_packing, args=(str(tree), str(target)))
    process.start()
    first = target / "000000.tar.json"
    while not first.exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (target / "pack.json").exists(), "it was to be killed before the end"
    with pytest.raises(UserError, match="not finished"):
        open_source(str(target))
    written = (target / "000000.tar").stat().st_mtime_ns
    pack(tree, target, FIVE)
    assert (target / "000000.tar").stat().st_mtime_ns == written
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.suffix != ".npz"} == {
        path.name: path.read_bytes() for path in packed.iterdir() if path.suffix != ".npz"
    }
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in packed.iterdir())


def test_packing_by_several_processes_gives_the_same(tree: Path, packed: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "many", PackOptions(shard_images=5, workers=2))
    for path in packed.glob("*.tar"):
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes()


def test_other_images_are_refused(tree: Path, packed: Path) -> None:
    (tree / "cat" / "new.png").write_bytes((tree / "cat" / "0.png").read_bytes())
    with pytest.raises(UserError, match="other images"):
        pack(tree, packed, FIVE)


def test_the_command(tree: Path, tmp_path: Path) -> None:
    words = [str(tree), str(tmp_path / "packed"), "--shard_images", "5", "--workers", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "clusterssl.data.pack", *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "12 images in 3 shards" in done.stderr
    codes, said = Launched("src/clusterssl/data/pack.py", *words).wait()
    assert codes == [0] and "12 images in 3 shards, all as written" in said
    codes, said = Launched("src/clusterssl/data/pack.py", str(tmp_path / "nothing"), *words[1:]).wait()
    assert codes == [2] and "Traceback" not in said


def test_bad_input_is_told(tree: Path, tmp_path: Path, packed: Path) -> None:
    (tree / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png: cannot be packed \(No such file"):
        pack(tree, tmp_path / "other", FIVE)
    with pytest.raises(UserError, match="must be at least 1 and at most 100"):
        PackOptions(quality=0)
    record = json.loads((packed / "pack.json").read_text())
    (packed / "index.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        PackedSource(packed)
    assert record["version"] == 1 and record["images"] == 12


def test_splits_are_packed_each_by_itself_or_named(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "data" / "train")
    shutil.copytree(tree, tmp_path / "data" / "validation")
    with pytest.raises(UserError, match="holds train/ but neither val/ nor test/; name its splits"):
        pack(tmp_path / "data", tmp_path / "packed", FIVE)
    with pytest.raises(UserError, match="has no folder dev/"):
        pack(tmp_path / "data", tmp_path / "packed", PackOptions(splits=("train", "dev")))
    pack(tmp_path / "data", tmp_path / "packed", PackOptions(splits=("train", "validation"), workers=1))
    assert open_source(str(tmp_path / "packed"), split="validation").classes == open_source(str(tree)).classes
    shutil.copytree(tree, tmp_path / "data" / "val")
    pack(tmp_path / "data", tmp_path / "all", PackOptions(workers=1))
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["train", "val", "validation"]


def test_refuses_the_images_themselves_and_what_it_cannot_write(tree: Path, tmp_path: Path) -> None:
    for target in (tree, tree / "inside"):
        with pytest.raises(UserError, match="lies inside the images"):
            pack(tree, target, FIVE)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        pack(tree, tmp_path / "file", FIVE)
    with pytest.raises(UserError, match="cannot be written"):
        pack(tree, tmp_path / "file" / "packed", FIVE)


def test_a_pack_is_no_source_of_another(tree: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is packed already; give it as --data_path"):
        pack(packed, tmp_path / "again", FIVE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["SRC"], "put the two folders first: python -m clusterssl.data.pack SRC DST [--flags]"),
        (["--workers", "1", "SRC", "DST"], "put the two folders first"),
        (["SRC", "DST", "--quality", "90"], "--quality: files stay as they are without --short_side"),
        (["SRC", "DST", "--qualty", "90"], "did you mean --quality?"),
    ],
)
def test_words_that_make_no_sense(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pack.py", *words])
    with pytest.raises(UserError) as raised:
        main()
    assert told in str(raised.value)


def test_help_shows_the_folders(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pack.py", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: python -m clusterssl.data.pack SRC DST [--flags]")


def test_one_shard_is_one(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        pack(tree, tmp_path / "packed", PackOptions(workers=1))
    assert "12 images in 1 shard" in caplog.text and "1 shards" not in caplog.text
