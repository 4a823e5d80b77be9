"""Where images come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from clusterssl.data import BadImageError, fingerprint, open_source
from clusterssl.data.builtin import DIGIT_SPLITS
from clusterssl.errors import UserError


def save(path: Path, value: int = 0) -> None:
    """A small picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, value, value)).save(path)


def names(source: object, root: Path) -> list[str]:
    """Names relative to a folder."""
    return [str(Path(source.name(i)).relative_to(root)) for i in range(len(source))]  # type: ignore[attr-defined, arg-type]


def test_class_tree_equals_torchvisions_image_folder(tree: Path) -> None:
    save(tree / "dog" / "z.PNG")
    save(tree / "dog" / "small-er" / "a.jpeg")
    (tree / "dog" / ".hidden.png").write_bytes(b"")
    (tree / ".cache").mkdir()
    save(tree / ".cache" / "x.png")
    (tree / "eel" / "notes.txt").write_text("no image")
    source = open_source(str(tree))
    (tree / "dog" / ".hidden.png").unlink()
    (tree / ".cache" / "x.png").unlink()
    (tree / ".cache").rmdir()
    expected = ImageFolder(str(tree))
    assert source.classes == expected.classes == ["cat", "dog", "eel"]
    assert [source.name(i) for i in range(len(source))] == [path for path, _ in expected.samples]
    np.testing.assert_array_equal(source.labels, expected.targets)
    assert source.labels.dtype == np.int64
    for i in (0, 5, len(source) - 1):
        assert torch.equal(source.load(i), torch.from_numpy(np.array(expected[i][0])).permute(2, 0, 1))


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.png"):
        save(tmp_path / name)
    source = open_source(str(tmp_path))
    assert names(source, tmp_path) == ["a.jpg", "b.png", "sub/c.png"]
    assert source.classes == [] and source.labels.tolist() == [-1, -1, -1]


def test_splits(tree: Path, tmp_path: Path) -> None:
    tree.rename(tmp_path / "train")
    for i in range(2):
        save(tmp_path / "val" / "cat" / f"{i}.png")
    assert len(open_source(str(tmp_path), split="val")) == 2
    assert len(open_source(str(tmp_path), split="train")) == 12
    assert len(open_source(str(tmp_path))) == 12
    assert len(open_source(str(tmp_path / "val"))) == 2
    with pytest.raises(UserError, match="no folder test/"):
        open_source(str(tmp_path), split="test")


def test_limit_keeps_the_first(tree: Path) -> None:
    source, whole = open_source(str(tree), limit=5), open_source(str(tree))
    assert len(source) == 5 and len(source.labels) == 5
    assert [source.name(i) for i in range(5)] == [whole.name(i) for i in range(5)]
    assert source.classes == whole.classes
    assert len(open_source(str(tree), limit=100)) == 12
    with pytest.raises(UserError, match="limit of 0"):
        open_source(str(tree), limit=0)


def test_links_are_followed_and_loops_are_not(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    save(other / "x.png", 9)
    (tree / "fox").symlink_to(other)
    (tree / "cat" / "again").symlink_to(tree)
    (tree / "cat" / "link.png").symlink_to(other / "x.png")
    (tree / "cat" / "dead.png").symlink_to(other / "absent.png")
    source = open_source(str(tree))
    assert source.classes == ["cat", "dog", "eel", "fox"]
    listed = names(source, tree)
    assert "fox/x.png" in listed and "cat/link.png" in listed and not any("again" in name for name in listed)
    assert source.load(listed.index("cat/link.png")).float().mean() == 9
    with pytest.raises(BadImageError, match="No such file"):
        source.load(listed.index("cat/dead.png"))


def test_subset_of_classes_is_numbered_as_the_file_names_them(tree: Path, tmp_path: Path) -> None:
    subset = tmp_path / "classes.txt"
    subset.write_text("eel  European eel\n\ncat\n")
    source, whole = open_source(str(tree), subset_file=str(subset)), open_source(str(tree))
    assert source.classes == ["eel", "cat"] and source.labels.tolist() == [1] * 4 + [0] * 4
    kept = [i for i in range(12) if whole.classes[whole.labels[i]] != "dog"]
    assert [source.name(i) for i in range(8)] == [whole.name(i) for i in kept]
    assert torch.equal(source.load(7), whole.load(11))
    digits = open_source("digits", subset_file=str(_written(tmp_path, "8\n3\n")))
    assert len(digits) == (np.isin(open_source("digits").labels, [3, 8])).sum() and set(digits.labels) == {0, 1}


def _written(folder: Path, text: str) -> Path:
    path = folder / "subset.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cat\nyak\nemu big\n", r"2 of 3 classes are not in the data \(yak, emu\); it has 3 \(cat, dog, eel\)"),
        ("\n \n", "names no class; write one class name a line"),
        ("cat\ndog\ncat\n", "names cat more than once"),
    ],
)
def test_impossible_subsets(text: str, told: str, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        open_source(str(tree), subset_file=str(_written(tmp_path, text)))


def test_subset_of_images_without_classes_or_file(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these images have no classes"):
        open_source(str(tree / "cat"), subset_file=str(_written(tmp_path, "cat\n")))
    with pytest.raises(UserError, match=r"no\.txt: cannot be read"):
        open_source(str(tree), subset_file=str(tmp_path / "no.txt"))


def test_list_file(tree: Path, tmp_path: Path) -> None:
    save(tree / "a b.png", 7)
    lines = [
        "tree/cat/0.png\tcat",
        "",
        "tree/dog/small/1.png dog",
        f"{tree}/eel/2.png",
        "tree/a b.png",
        "tree/a b.png eel\r",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "list.txt"))
    assert names(source, tree) == ["cat/0.png", "dog/small/1.png", "eel/2.png", "a b.png", "a b.png"]
    assert source.classes == ["cat", "dog", "eel"]
    assert source.labels.tolist() == [0, 1, -1, -1, 2]
    assert source.load(3).float().mean() == 7


def test_numbers_as_labels_sort_as_numbers(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "list.lst").write_text("".join(f"tree/cat/{i}.png {label}\n" for i, label in enumerate([10, 9, 10, 0])))
    source = open_source(str(tmp_path / "list.lst"))
    assert source.classes == ["0", "9", "10"] and source.labels.tolist() == [2, 1, 2, 0]


def test_odd_file_names(tmp_path: Path) -> None:
    for name in ("ünï.png", "new\nline.png", "tab\there.png"):
        save(tmp_path / name, 5)
    bytes_name = bytes(tmp_path) + b"/\xff.png"
    with open(bytes_name, "wb") as file:  # noqa: PTH123 - a name that is no text
        file.write((tmp_path / "ünï.png").read_bytes())
    source = open_source(str(tmp_path))
    assert len(source) == 4
    assert all(source.load(i).float().mean() == 5 for i in range(4))


def test_digits() -> None:
    parts = {split: open_source("digits", split=split) for split in DIGIT_SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1000, "val": 300, "test": 497}
    rows = [int(part.name(i).split("/")[-1]) for part in parts.values() for i in range(len(part))]
    assert sorted(rows) == list(range(1797))
    data = load_digits()
    for part in parts.values():
        numbers = [int(part.name(i).split("/")[-1]) for i in range(len(part))]
        np.testing.assert_array_equal(part.labels, data.target[numbers])
        share = np.bincount(part.labels, minlength=10) / len(part)
        assert np.abs(share - np.bincount(data.target) / 1797).max() < 0.005
        image = part.load(0)
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert torch.equal(image[0], image[2])
        small = torch.nn.functional.avg_pool2d(image[:1].float(), 4)[0]
        assert np.corrcoef(small.numpy().ravel(), data.images[numbers[0]].ravel())[0, 1] > 0.95
    assert len(open_source("digits", limit=64)) == 64
    assert torch.equal(open_source("digits", limit=64).load(63), parts["train"].load(63))
    with pytest.raises(UserError, match="train, val, test"):
        open_source("digits", split="valid")


def test_synthetic() -> None:
    source = open_source("synthetic:40:20x30:5")
    assert len(source) == 40 and source.load(3).shape == (3, 20, 30) and len(source.classes) == 5
    assert np.bincount(source.labels).tolist() == [8] * 5
    assert torch.equal(source.load(3), open_source("synthetic:40:20x30:5").load(3))
    assert not torch.equal(source.load(3), open_source("synthetic:40:20x30:5", split="val").load(3))
    assert not torch.equal(source.load(3), source.load(8))
    assert len(open_source("synthetic")) == 256
    means = torch.stack([source.load(i).float().std((1, 2)) for i in range(40)]).numpy()
    between = np.stack([means[source.labels == c].mean(0) for c in range(5)]).std(0)
    assert between.max() > 5
    for bad in ("synthetic:", "synthetic:0", "synthetic:10:32", "synthetic:10:0x5", "synthetic:x"):
        with pytest.raises(UserError, match="synthetic:N:HxW:classes"):
            open_source(bad)


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "x.zip").write_text("")
    told = {
        "": "no data",
        str(tmp_path / "absent"): "does not exist",
        str(tmp_path / "empty"): "is empty",
        str(tmp_path / "texts"): r"holds no images \(read are .jpg .jpeg .png",
        str(tmp_path / "none.txt"): "names no files",
        str(tmp_path / "x.zip"): "give a folder",
    }
    for path, message in told.items():
        with pytest.raises(UserError, match=message) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(UserError, match="has no split 'val'"):
        open_source(str(tmp_path / "list.txt"), split="val")


def test_the_fingerprint_is_of_the_images_not_of_the_place(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        for number in range(3):
            save(tmp_path / place / f"class{number % 2}" / f"{number}.png")
    here, there = (open_source(str(tmp_path / place)) for place in ("here", "there/deeper"))
    assert fingerprint(here) == fingerprint(there) != fingerprint(open_source("digits"))
    whole = Path(here.name(1)).read_bytes()
    Path(here.name(1)).write_bytes(whole + b"more")
    assert fingerprint(here) != fingerprint(there)
    Path(here.name(1)).write_bytes(whole)
    assert fingerprint(here) == fingerprint(there)
    Path(here.name(0)).rename(tmp_path / "here" / "renamed.png")
    assert fingerprint(open_source(str(tmp_path / "here"))) != fingerprint(there)
