"""Batched augmentation: every operation equals its reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as TF

from clusterssl.data import MEAN, STD, Augment, MultiCrop, normalize
from clusterssl.data import augment as augment_module
from clusterssl.data.decode import decode_file
from clusterssl.data.params import JITTER_ORDERS, NUM_PARAMS, Param

TOLERANCE = 1e-4


def neutral(views: int, rows: int) -> Tensor:
    """Parameters that leave images as they are."""
    params = torch.zeros(views, rows, NUM_PARAMS)
    params[..., [Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION]] = 1
    return params


def pictures(rows: int, height: int = 24, width: int = 20, seed: int = 0) -> Tensor:
    """Smooth and noisy images, with black, white, grey and saturated ones."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (rows, 3, height, width), dtype=torch.uint8, generator=generator)
    images[0], images[1] = 0, 255
    images[2] = images[2, :1]
    images[3] = (images[3] > 128) * 255
    return images


def pixels(normalised: Tensor) -> Tensor:
    """Undoes the normalisation."""
    return normalised * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def reference(image: Tensor, p: Tensor) -> Tensor:
    """One image through torchvision's float functionals, in the published order."""
    x = image.float() / 255
    if p[Param.FLIP]:
        x = TF.hflip(x)
    if p[Param.JITTER]:
        operations = (
            (TF.adjust_brightness, Param.BRIGHTNESS),
            (TF.adjust_contrast, Param.CONTRAST),
            (TF.adjust_saturation, Param.SATURATION),
            (TF.adjust_hue, Param.HUE),
        )
        for i in JITTER_ORDERS[int(p[Param.ORDER])]:
            x = operations[i][0](x, float(p[operations[i][1]]))
    if p[Param.GRAY]:
        x = TF.rgb_to_grayscale(x, 3)
    if p[Param.SOLARIZE]:
        x = TF.solarize(x, 128 / 255)
    return TF.normalize(x, list(MEAN), list(STD))


SINGLE = [
    (Param.FLIP, [1, 1, 1]),
    (Param.BRIGHTNESS, [0.2, 0.7, 1.8]),
    (Param.CONTRAST, [0.2, 0.7, 1.8]),
    (Param.SATURATION, [0.0, 0.6, 1.8]),
    (Param.HUE, [-0.2, 0.07, 0.5]),
    (Param.GRAY, [1, 1, 1]),
    (Param.SOLARIZE, [1, 1, 1]),
]


@pytest.mark.parametrize(("column", "values"), SINGLE)
def test_each_operation_equals_torchvision(column: Param, values: list[float]) -> None:
    images = pictures(18)
    params = neutral(1, 18)
    params[..., Param.JITTER] = column in (Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION, Param.HUE)
    params[0, :, column] = torch.tensor(values).repeat(6)
    params[0, 5, column] = neutral(1, 1)[0, 0, column]
    (ours,) = Augment()([images], params)
    expected = torch.stack([reference(x, p) for x, p in zip(images, params[0], strict=True)])
    assert (ours - expected).abs().max() < TOLERANCE
    assert (ours - normalize(images)).abs().max() > 0.1


def test_normalisation_alone() -> None:
    images = pictures(6)
    (ours,) = Augment()([images], neutral(1, 6))
    expected = TF.normalize(images.float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert STD[0] == 0.228


def test_every_order_of_the_jitter() -> None:
    images = pictures(48)
    params = neutral(1, 48)
    params[0, :, Param.JITTER] = 1
    params[0, :, Param.ORDER] = torch.arange(48) % 24
    generator = torch.Generator().manual_seed(1)
    for column, low, high in [(3, 0.2, 1.8), (4, 0.2, 1.8), (5, 0.2, 1.8), (6, -0.2, 0.2)]:
        params[0, :, column] = low + (high - low) * torch.rand(48, generator=generator)
    (ours,) = Augment()([images], params)
    expected = torch.stack([reference(x, p) for x, p in zip(images, params[0], strict=True)])
    assert (ours - expected).abs().max() < TOLERANCE


def test_drawn_batches_of_views_of_several_sizes() -> None:
    crop = MultiCrop((2, 1, 2), (24, (16, 30), 12), (0.3,) * 3, (1.0,) * 3, blur_p=0.0, solarize_p=0.3)
    params = torch.from_numpy(crop.params(crop.uniforms(5, 0, np.arange(40))).swapaxes(0, 1).copy())
    crops = [pictures(40, *size, seed=v) for v, size in enumerate(crop.sizes)]
    before = [c.clone() for c in crops]
    ours = Augment()(crops, params)
    for v in range(crop.num_views):
        expected = torch.stack([reference(x, p) for x, p in zip(crops[v], params[v], strict=True)])
        assert ours[v].shape == crops[v].shape and ours[v].dtype == torch.float32
        worst = (ours[v] - expected).abs().amax((1, 2, 3))
        # a value a rounding error away from 128 / 255 may be solarized or not
        assert (worst[params[v, :, Param.SOLARIZE] == 0] < TOLERANCE).all()
        assert ((ours[v] - expected).abs() > TOLERANCE).float().mean() < 1e-3
        assert torch.equal(crops[v], before[v])


def test_layout_chunks_and_company_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    crop = MultiCrop((2,), (24,))
    params = torch.from_numpy(crop.params(crop.uniforms(5, 0, np.arange(30))).swapaxes(0, 1).copy())
    crops = [pictures(30, 24, 24, seed=v) for v in range(2)]
    whole = Augment()(crops, params)
    last = Augment()([c.contiguous(memory_format=torch.channels_last) for c in crops], params)
    alone = Augment()([c[7:8] for c in crops], params[:, 7:8])
    monkeypatch.setitem(augment_module._CHUNK_ELEMENTS, "cpu", 4000)
    pieces = Augment()(crops, params)
    for v in range(2):
        torch.testing.assert_close(last[v], whole[v], atol=1e-5, rtol=0)
        torch.testing.assert_close(pieces[v], whole[v], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone[v], whole[v][7:8], atol=1e-5, rtol=0)


def test_all_rows_grey_then_some_blurred() -> None:
    images = pictures(6)
    params = neutral(1, 6)
    params[..., Param.GRAY] = 1
    params[0, 4:, Param.SIGMA] = 1.0
    (ours,) = Augment()([images], params)
    expected = torch.stack([reference(x, p) for x, p in zip(images[:4], params[0], strict=False)])
    assert (ours[:4] - expected).abs().max() < TOLERANCE
    assert (pixels(ours)[:, 0] - pixels(ours)[:, 2]).abs().max() < 1e-5


def test_nothing_random_and_no_gradient() -> None:
    crop = MultiCrop((2,), (24,))
    params = torch.from_numpy(crop.params(crop.uniforms(5, 0, np.arange(8))).swapaxes(0, 1).copy())
    crops = [pictures(8, 24, 24) for _ in range(2)]
    state = torch.get_rng_state()
    first, second = Augment()(crops, params), Augment()(crops, params)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Augment()(crops, params)
    for a, b in zip(first, inside, strict=True):
        torch.testing.assert_close(a, b)


def blurred(images: Tensor, radius: list[float]) -> Tensor:
    """Our blur alone, in 0..255."""
    params = neutral(1, len(images))
    params[0, :, Param.SIGMA] = torch.tensor(radius)
    return pixels(Augment()([images], params)[0]) * 255


def pil_blurred(image: Tensor, radius: float) -> Tensor:
    """PIL's GaussianBlur, in 0..255."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return TF.pil_to_tensor(picture.filter(ImageFilter.GaussianBlur(radius))).float()


RADII = [0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.4142, 1.6, 1.9, 2.0]


def test_blur_equals_pils_on_photos(photos: list[Path]) -> None:
    crops = [decode_file(path)[None] for path in photos[: len(RADII)]]
    for image, radius in zip(crops, RADII, strict=True):
        square = image[..., : min(image.shape[2:]), : min(image.shape[2:])]
        for size in (96, 224):
            small = TF.resize(square, [size, size], antialias=True).contiguous()
            difference = (blurred(small, [radius])[0] - pil_blurred(small[0], radius)).abs()
            assert difference.mean() < 1  # the requirement is 2 / 255; rounding between PIL's six passes makes 0.3


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (5, 3), (2, 9), (1, 6), (1, 1)])
def test_blur_equals_pils_on_noise_and_at_borders(size: tuple[int, int]) -> None:
    images = torch.stack([pictures(4, *size, seed=i)[2] for i in range(len(RADII))])
    ours = blurred(images, RADII)
    for i, radius in enumerate(RADII):
        difference = (ours[i] - pil_blurred(images[i], radius)).abs()
        assert difference.mean() < 2


def test_blur_keeps_constants_and_total() -> None:
    flat = torch.full((3, 3, 12, 20), 77, dtype=torch.uint8)
    torch.testing.assert_close(blurred(flat, [0.1, 1.0, 2.0]), flat.float(), atol=1e-3, rtol=0)
    dot = torch.zeros(2, 3, 41, 41, dtype=torch.uint8)
    dot[..., 20, 20] = 255
    ours = blurred(dot, [1.0, 2.0]) / 255
    torch.testing.assert_close(ours.sum((2, 3)), torch.ones(2, 3), atol=1e-3, rtol=0)
    spread = (ours[:, 0].sum(1) * (torch.arange(41.0) - 20) ** 2).sum(1).sqrt()
    torch.testing.assert_close(spread, torch.tensor([1.0, 2.0]), atol=0.01, rtol=0)
