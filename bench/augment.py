"""Colour, blur, flip and normalisation of a batch of crops: ours beside one image at a time, kornia and torchvision.

    python bench/augment.py
    python bench/augment.py --device cuda --images 256 --repeats 30

Crops are uint8, 2 x 224 + 6 x 96 an image, cut from real photographs. "one by one" applies torchvision's functionals of
tensors to one crop after the other with the parameters ours was given. "ours, compiled" is what --compile does, its
compilation not counted; on a CPU --compile leaves the augmentation as it is. kornia and torchvision v2 draw parameters
of their own with the same distributions; v2 draws them once a batch, which is less work. The systems take turns;
medians count. On a GPU the time includes the copy of the crops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from gpu import IN_A_ROW
from photos import folder_of_photos
from record import options_of, write_result
from summary import Bar, Line, Summary, against, count, often, quantity
from timing import in_turns
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from clusterssl import config as cfg
from clusterssl.data import MEAN, STD, Augment, Batch, MultiCrop, MultiCropDataset, open_source
from clusterssl.data.params import JITTER_ORDERS, Param
from clusterssl.pretrain import keep_freed_memory

System = Callable[[], Any]
BARS = {"cpu": Bar("colour, blur, flip, normalisation of an image on one core", 19, "ms", most=True)}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    data_path: str = ""
    """folder of photographs; without it those of imagenet-sample.tar in $CLUSTERSSL_DATA"""
    images: int = 16
    repeats: int = 5
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    out: str = "runs/bench/augment.json"


def one_by_one(crops: list[Tensor], params_VBP: Tensor, device: str) -> list[Tensor]:
    """The same operations with the same parameters, crop by crop."""
    return [
        torch.stack([_one(x, p) for x, p in zip(x_B3HW.to(device), params_BP.tolist(), strict=True)])
        for x_B3HW, params_BP in zip(crops, params_VBP, strict=True)
    ]


def _one(x_3HW: Tensor, p: list[float]) -> Tensor:
    x_3HW = x_3HW.contiguous().float().div_(255)
    x_3HW = tvf.horizontal_flip(x_3HW) if p[Param.FLIP] else x_3HW
    if p[Param.JITTER]:
        changes: list[Callable[[Tensor], Tensor]] = [
            lambda x: tvf.adjust_brightness(x, p[Param.BRIGHTNESS]),
            lambda x: tvf.adjust_contrast(x, p[Param.CONTRAST]),
            lambda x: tvf.adjust_saturation(x, p[Param.SATURATION]),
            lambda x: tvf.adjust_hue(x, p[Param.HUE]),
        ]  # fmt: skip
        for number in JITTER_ORDERS[int(p[Param.ORDER])]:
            x_3HW = changes[number](x_3HW)
    x_3HW = tvf.rgb_to_grayscale(x_3HW, 3) if p[Param.GRAY] else x_3HW
    x_3HW = tvf.gaussian_blur(x_3HW, [23, 23], [p[Param.SIGMA]] * 2) if p[Param.SIGMA] else x_3HW
    return tvf.normalize(x_3HW, list(MEAN), list(STD))


def torchvision_v2() -> nn.Module:
    """torchvision's transforms of float batches."""
    jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True), v2.RandomHorizontalFlip(0.5), jitter, v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5), v2.Normalize(MEAN, STD),
    ])  # fmt: skip


def kornia() -> nn.Module:
    """kornia's augmentations of float batches."""
    import kornia.augmentation as aug

    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return nn.Sequential(
        aug.RandomHorizontalFlip(0.5), aug.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8), aug.RandomGrayscale(p=0.2),
        aug.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5), aug.Normalize(mean, std),
    )  # fmt: skip


def batch_of(options: Options) -> Batch:
    """Crops of some photographs, with their augmentation drawn."""
    multicrop = MultiCrop((2, 6), (224, 96), (0.14, 0.05), (1.0, 0.14))
    with folder_of_photos(options.data_path) as folder:
        source = open_source(folder)
        keys = [(number // len(source), number % len(source)) for number in range(options.images)]
        batch = MultiCropDataset(source, multicrop, seed=0).__getitems__(keys)
    pinned = options.device == "cuda"  # as in training
    return batch._replace(crops=[x.pin_memory() for x in batch.crops]) if pinned else batch


def systems(batch: Batch, device: str) -> dict[str, System]:
    """What is compared; kornia where it is installed."""
    ours, compiled, other = Augment(), Augment().fuse(), torchvision_v2()
    resolutions = [torch.cat(batch.crops[:2]), torch.cat(batch.crops[2:])]
    found: dict[str, System] = {
        "ours": lambda: ours(batch.crops, batch.params, device),
        "ours, compiled": lambda: compiled(batch.crops, batch.params, device),
        "one by one": lambda: one_by_one(batch.crops, batch.params, device),
        "torchvision v2": lambda: [other(x.to(device)) for x in resolutions],
    }
    try:
        third = kornia()
    except ImportError:
        print("kornia is not installed: left out")
        return found
    return {**found, "kornia": lambda: [third(x.to(device).contiguous().float().div_(255)) for x in resolutions]}


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, table = result["options"], result["ms_per_image"]
    on_cpu = options["device"] == "cpu"
    seconds = {name: {key: value / 1e3 for key, value in one.items()} for name, one in table.items()}
    what, median = BARS["cpu"].what, table["ours"]["median"]
    line = (BARS["cpu"].judge(median, "published, decoding included: 19 to 20 ms") if on_cpu and options["threads"] == 1
            else Line(what.removesuffix(" on one core"), quantity(median, "ms")))  # fmt: skip
    return Summary(
        "What do colour, blur, flip and normalisation of an image's crops cost?",
        "ours; crop by crop, torchvision v2, kornia",
        f"2 x 224 + 6 x 96 px, {options['images']} images at once, "
        f"{count(options['threads'], 'thread') if on_cpu else 'GPU'}; {often(options['repeats'])}.",
        [against(seconds, what="an image")],
        [line],
        "The share of a GPU's training step is told by `train_step`.",
    )


def main() -> None:
    options = options_of(Options, __doc__)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    batch = batch_of(options)
    with torch.no_grad():
        found = in_turns(
            systems(batch, options.device), options.repeats, in_a_row=IN_A_ROW if options.device == "cuda" else 1
        )
    table = {}
    for name, one in found.items():
        ms = {key: 1e3 * value / options.images for key, value in one._asdict().items()}
        table[name] = {**ms, "over_ours": one.median / found["ours"].median}
    write_result(Path(options.out), {"options": cfg.plain(options), "ms_per_image": table}, summary)


if __name__ == "__main__":
    cfg.entry(main)
