"""Decoding: every kind of image becomes RGB, every broken file a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterssl.data import decode as decode_module
from clusterssl.data.decode import BadImageError, decode_file, jpeg_frame


def gradient(height: int = 30, width: int = 44) -> np.ndarray:
    """A smooth colour picture."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 3 % 256], axis=-1).astype(np.uint8)


def chw(array: np.ndarray) -> torch.Tensor:
    """[H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


MODES = {
    ".png": ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"],
    ".jpg": ["RGB", "L", "CMYK", "YCbCr"],
    ".tif": ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I"],
    ".webp": ["RGB", "L", "RGBA"],
    ".bmp": ["RGB", "L", "1", "P"],
    ".ppm": ["RGB"],
    ".pgm": ["L", "I;16"],
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb(tmp_path: Path, suffix: str, mode: str) -> None:
    picture = Image.fromarray(gradient())
    if mode in ("I;16", "I"):
        grey = np.array(picture.convert("L")).astype(np.uint16) * 256 + 128
        picture = Image.fromarray(grey if mode == "I;16" else grey.astype(np.int32))
    else:
        picture = picture.convert(mode)
    path = tmp_path / f"x{suffix}"
    picture.save(path)
    image = decode_file(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 30, 44)
    with Image.open(path) as again:
        if again.mode in ("I;16", "I"):
            expected = np.repeat((np.array(again) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        else:
            expected = np.array(again.convert("RGB"))
    assert (image.float() - chw(expected).float()).abs().mean() < 0.5
    assert image.float().std() > 20


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"optimize": True}])
def test_jpegs_equal_pils(tmp_path: Path, options: dict[str, int]) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(gradient(61, 83)).save(path, **options)  # type: ignore[arg-type]
    expected = chw(np.array(Image.open(path).convert("RGB")))
    assert (decode_file(path).float() - expected.float()).abs().max() <= 2


def test_photos_equal_pils(photos: list[Path]) -> None:
    for path in photos:
        expected = chw(np.array(Image.open(path).convert("RGB")))
        assert (decode_file(path).float() - expected.float()).abs().mean() < 0.1


def test_orientation_is_ignored_as_published(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(tmp_path / "x.jpg", exif=exif)
    assert decode_file(tmp_path / "x.jpg").shape == (3, 30, 44)


def jpeg_bytes() -> bytes:
    """A good JPEG."""
    out = io.BytesIO()
    Image.fromarray(gradient()).save(out, "JPEG")
    return out.getvalue()


def png_bytes() -> bytes:
    """A good PNG."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def png_bomb() -> bytes:
    """A few kilobytes that claim 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def jpeg_bomb() -> bytes:
    """A JPEG whose header claims 60,000 x 60,000 pixels."""
    data = bytearray(jpeg_bytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"this is not an image, it only says so\n" * 20, "not an image"),
    "truncated jpeg": (jpeg_bytes()[:-200], "[Tt]runcated"),
    "jpeg header only": (jpeg_bytes()[:300], "."),
    "truncated png": (png_bytes()[:2000], "."),
    "two bytes": (b"\xff\xd8", "."),
    "png bomb": (png_bomb(), "60000 x 60000 pixels|exceeds limit"),
    "jpeg bomb": (jpeg_bomb(), "60000 x 60000 pixels"),
    "random": (np.random.default_rng(0).bytes(5000), "not an image"),
    "pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n", "not an image"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_broken_files_give_a_reason(tmp_path: Path, kind: str, suffix: str) -> None:
    content, reason = BROKEN[kind]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=reason) as caught:
        decode_file(path)
    assert "\n" not in str(caught.value)


def test_truncation_anywhere_is_caught_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    for data in (jpeg_bytes(), png_bytes()):
        for length in range(0, len(data) - 20, len(data) // 40):
            path.write_bytes(data[:length])
            with pytest.raises(BadImageError):
                decode_file(path)


def test_missing_and_oversized_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadImageError, match="No such file"):
        decode_file(tmp_path / "absent.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(BadImageError, match="cannot be read"):
        decode_file(tmp_path / "folder.jpg")
    (tmp_path / "x.jpg").write_bytes(jpeg_bytes())
    monkeypatch.setattr(decode_module, "MAX_FILE_BYTES", 100)
    with pytest.raises(BadImageError, match="at most 100"):
        decode_file(tmp_path / "x.jpg")


def test_size_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 30 * 44 - 1)
    for name in ("x.jpg", "x.png", "x.tif"):
        Image.fromarray(gradient()).save(tmp_path / name)
        with pytest.raises(BadImageError, match="44 x 30 pixels"):
            decode_file(tmp_path / name)


def test_jpeg_header() -> None:
    frame = jpeg_frame(np.frombuffer(jpeg_bytes(), dtype=np.uint8))
    assert frame == (30, 44, 3, 8)
    assert jpeg_frame(np.frombuffer(png_bytes(), dtype=np.uint8)) is None
    assert jpeg_frame(np.frombuffer(b"\xff\xd8\xff\xe0\xff\xff" + bytes(20), dtype=np.uint8)) is None
