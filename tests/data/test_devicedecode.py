"""Files decoded by the main process: the batches of the workers' own decoding, with the CPU's decoder in every bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clusterssl.data import Batch, Loader, MultiCrop, open_source
from clusterssl.data import devicedecode as module
from clusterssl.data.decode import decode
from clusterssl.data.devicecrops import Pixels, device_crops
from clusterssl.data.devicedecode import Decoder, DeviceDecode, RawDataset, gpu_decoder
from clusterssl.data.pack import PackOptions, pack
from clusterssl.errors import UserError
from tests.data.test_resident import assert_same, batches

CPU = torch.device("cpu")
CROP = MultiCrop((2, 1), (24, (12, 30)), (0.3, 0.1), (1.0, 0.5))
REFUSED = 130 + 9 * 10


def by_cpu(files: list[Tensor]) -> list[Tensor]:
    """A decoder of JPEGs only, which refuses the whole list for one of a certain height."""
    images = [decode(file.numpy()) for file in files]
    if any(image.shape[1] == REFUSED for image in images):
        raise RuntimeError("refused")
    return images


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """JPEGs of many sizes, grey and CMYK ones, PNGs, a truncated JPEG, text, an empty file, a progressive one."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(16):
        image = Image.fromarray(rng.integers(0, 256, (130 + 9 * number, 190 - 4 * number, 3), dtype=np.uint8))
        mode, kind = {3: ("L", "jpg"), 5: ("CMYK", "jpg"), 6: ("RGB", "png")}.get(number, ("RGB", "jpg"))
        image.convert(mode).save(folder / f"{number:02}.{kind}", **({"progressive": True} if number == 8 else {}))
    whole = (folder / "09.jpg").read_bytes()
    (folder / "09.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "11.jpg").write_bytes(b"text")
    (folder / "12.jpg").write_bytes(b"")
    return folder


def decoded(path: Path, workers: int = 0, **more: str) -> list[Batch]:
    source = open_source(str(path), **more)  # type: ignore[arg-type]
    maker = DeviceDecode(source, by_cpu, CPU)
    found = batches(Loader(source, CROP, batch_size=8, workers=workers, seed=3, decode=maker), 2)
    assert maker.fallbacks == 6  # CMYK, PNG, truncated, refused, text, empty; not the whole lists that these were in
    return found


def numbered(count: int, odd: int, calls: list[int]) -> tuple[list[Tensor], Decoder]:
    """Files of one byte each, and a decoder that refuses every list with a certain one of them."""

    def decoder(files: list[Tensor]) -> list[Tensor]:
        calls.append(len(files))
        if any(int(file[0]) == odd for file in files):
            raise RuntimeError("refused")
        return [file.expand(3, 1, 1) for file in files]

    return [torch.tensor([number], dtype=torch.uint8) for number in range(count)], decoder


@pytest.mark.parametrize("odd", [0, 77, 255])
def test_one_odd_image_is_found_by_halving(odd: int) -> None:
    calls: list[int] = []
    files, decoder = numbered(256, odd, calls)
    images = DeviceDecode(open_source("digits", limit=2), decoder, CPU)._decoded(files)
    assert [None if image is None else int(image[0, 0, 0]) for image in images] == [
        None if number == odd else number for number in range(256)
    ]
    assert len(calls) == 1 + 2 * 8


GONE = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]
GONE += [torch.AcceleratorError("CUDA error: misaligned address")] if hasattr(torch, "AcceleratorError") else []


@pytest.mark.parametrize("error", GONE)
def test_a_full_or_broken_device_is_no_bad_image(error: RuntimeError) -> None:
    calls = []

    def decoder(files: list[Tensor]) -> list[Tensor]:
        calls.append(len(files))
        raise error

    files, _ = numbered(9, 0, [])
    with pytest.raises(type(error)) as told:
        DeviceDecode(open_source("digits", limit=2), decoder, CPU)._decoded(files)
    assert told.value is error and calls == [9]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_workers(workers: int, mixed: Path, tmp_path: Path) -> None:
    expected = batches(Loader(open_source(str(mixed), cache="none"), CROP, batch_size=8, seed=3), 2)
    assert sum(len(batch.bad) for batch in expected) >= 3
    assert_same(decoded(mixed, workers, cache="none"), expected)
    assert_same(decoded(mixed, workers, cache="ram"), expected)


def test_portions_do_not_matter(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoded(mixed, cache="none")
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 70_000)
    assert_same(decoded(mixed, cache="none"), whole)


def test_truncated_files_are_none_of_the_decoders(tmp_path: Path) -> None:
    """Which may make pictures of them."""
    rng = np.random.default_rng(1)
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 16)).save(thumbnail, "JPEG")
    for number in range(8):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(file, "JPEG")
        whole = file.getvalue()
        exif = b"\xff\xe1" + (2 + len(thumbnail.getvalue())).to_bytes(2, "big") + thumbnail.getvalue()
        whole = whole[:2] + exif + whole[2:] if number in (1, 5) else whole
        kept = {2: 0.5, 4: 0.99, 5: 0.5}.get(number, 1.0)
        padding = bytes(10) if number == 6 else b""
        (tmp_path / f"{number}.jpg").write_bytes(whole[: int(kept * len(whole))] + padding)
    source, seen = open_source(str(tmp_path), cache="none"), 0

    def careless(files: list[Tensor]) -> list[Tensor]:
        nonlocal seen
        seen += len(files)
        grey = torch.full((3, 60, 50), 128, dtype=torch.uint8)
        return [decode(file.numpy()) if b"\xff\xd9" in file[-99:].numpy().tobytes() else grey for file in files]

    maker = DeviceDecode(source, careless, CPU)
    ours = batches(Loader(source, CROP, batch_size=8, decode=maker), 0)
    expected = batches(Loader(source, CROP, batch_size=8), 0)
    assert {i for i, _ in expected[0].bad} == {2, 4, 5}
    assert_same(ours, expected)
    assert maker.fallbacks == 3 and seen == 5


def test_portions_of_other_formats_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        kind = ("png", "bmp", "webp")[number % 3]
        Image.new("RGB", (40 + number, 50)).save(tmp_path / f"{number:02}.{kind}")
    (tmp_path / "05.webp").write_bytes(b"text")
    source, taken = open_source(str(tmp_path), cache="none"), []

    def noted(pixels: Pixels, *others: Any) -> list[Tensor]:
        taken.append(len(pixels.flat_P3))
        return device_crops(pixels, *others)

    monkeypatch.setattr(module, "device_crops", noted)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 3 * 50 * 52)
    batches(Loader(source, CROP, batch_size=12, decode=DeviceDecode(source, by_cpu, CPU)), 0)
    assert max(taken) <= 3 * 50 * 52 and len(taken) <= 6
    raw = RawDataset(source).__getitems__([(0, i) for i in (4, 5, 0)])
    assert raw.areas.tolist() == [44 * 50, 0, 40 * 50] and not raw.suits.any()


def test_images_that_are_no_jpegs_are_told(tree: Path, mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        DeviceDecode(open_source(str(mixed), cache="none"), by_cpu, CPU)
        assert not caplog.messages
        DeviceDecode(open_source(str(tree), cache="none"), by_cpu, CPU)
    (message,) = caplog.messages
    assert message.startswith("--decode gpu: none of 8 images looked at is a JPEG that a GPU decodes, first ")
    assert "0.png; the main process decodes them one by one: leave --decode out" in message


def test_what_would_be_faster(tree: Path) -> None:
    source = open_source(str(tree), cache="none")
    told = Loader(source, CROP, batch_size=4, decode=DeviceDecode(source, by_cpu, CPU)).faster()
    assert "pack smaller images" in told and "leave --decode out" in told and "raise --workers" not in told


def test_packed_images_and_classes(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "packed", PackOptions(workers=1))
    names = tmp_path / "names.txt"
    names.write_text("eel\ncat\n")
    for path in (tree, tmp_path / "packed"):
        source = open_source(str(path), cache="none", subset_file=str(names))
        maker = DeviceDecode(source, by_cpu, CPU)
        ours = batches(Loader(source, CROP, batch_size=8, decode=maker), 0)
        assert_same(ours, batches(Loader(source, CROP, batch_size=8), 0))


def test_an_epoch_begins_anywhere(mixed: Path) -> None:
    source = open_source(str(mixed), cache="none")
    loader = Loader(source, CROP, batch_size=4, seed=1, decode=DeviceDecode(source, by_cpu, CPU))
    whole = batches(loader, 4)
    assert_same(batches(loader.another(), 4, 2), whole[2:])


@pytest.mark.parametrize(("data", "cache"), [("digits", "auto"), ("small", "auto")])
def test_images_without_files_are_refused(data: str, cache: str, tmp_path: Path) -> None:
    if data == "small":
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
        data = str(tmp_path)
    with pytest.raises(UserError, match="--decode gpu: these images are built in or kept decoded"):
        RawDataset(open_source(data, cache=cache))  # type: ignore[arg-type]


def test_no_gpu_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="--decode gpu: needs a CUDA GPU, and this run is on cpu; leave --decode out"):
        gpu_decoder(CPU)


@pytest.mark.gpu
def test_nvjpeg_sees_the_same_picture(tmp_path: Path) -> None:
    y, x = np.mgrid[:200, :260]
    smooth = np.stack([x, y, 255 - (x + y) / 2], axis=-1).clip(0, 255).astype(np.uint8)
    for number in range(8):
        Image.fromarray(np.roll(smooth, 20 * number, axis=1)).save(tmp_path / f"{number}.jpg", quality=95)
    source, device = open_source(str(tmp_path), cache="none"), torch.device("cuda")
    maker = DeviceDecode(source, gpu_decoder(device), device)
    (ours,) = batches(Loader(source, CROP, batch_size=8, decode=maker), 0)
    (expected,) = batches(Loader(source, CROP, batch_size=8), 0)
    assert maker.fallbacks == 0 and torch.equal(ours.index, expected.index)
    assert_alike(ours, expected)
    for kept in (0.1, 0.5, 0.98):
        for number in range(8):
            Image.fromarray(np.roll(smooth, 20 * number, axis=1)).save(tmp_path / f"{number}.jpg", quality=95)
        whole = (tmp_path / "3.jpg").read_bytes()
        (tmp_path / "3.jpg").write_bytes(whole[: int(kept * len(whole))])
        maker.fallbacks = 0
        (ours,) = batches(Loader(source, CROP, batch_size=8, decode=maker), 0)
        (expected,) = batches(Loader(source, CROP, batch_size=8), 0)
        assert maker.fallbacks == 1 and ours.bad == expected.bad and [i for i, _ in ours.bad] == [3]
        assert_alike(ours, expected)


def assert_alike(ours: Batch, expected: Batch) -> None:
    """Crops of two decoders: chroma is interpolated differently."""
    for a, b in zip(ours.crops, expected.crops, strict=True):
        gap = (a.cpu().int() - b.int()).abs().float()
        assert a.is_cuda and gap.mean() < 1.5 and gap.max() < 40
