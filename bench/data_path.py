"""What an image costs a loader worker: decoding and 2 x 224 + 6 x 96 crops of real photographs, one thread.

    CLUSTERSSL_DATA=data python bench/data_path.py
    python bench/data_path.py --data_path /imagenet/train --images 200

"ours" is what our workers do: decode, crop, resize; colour, blur, flip and normalisation follow in batches on the
training device. "ours and augmentation" adds these here, so that both sides do all the work. The published pipeline is
written anew from its description with torchvision's transforms on PIL images: random resized crop, flip, colour jitter
of strength 0.8 / 0.2 with probability 0.8, grey 0.2, PIL blur of radius 0.1 to 2 with probability 0.5, tensor,
normalisation. "ours, packed" reads what `clusterssl.data.pack --short_side 256` made of the photographs. All are in the
page cache. The systems take turns; medians count.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from photos import folder_of_photos
from PIL import Image, ImageFilter
from record import options_of, write_result
from summary import Bar, Summary, Table, often, quantity, times
from timing import in_turns
from torchvision import transforms

from clusterssl import config as cfg
from clusterssl.data import MEAN, STD, Augment, MultiCrop, MultiCropDataset, Source, open_source
from clusterssl.data.decode import decode_file
from clusterssl.data.pack import PackOptions, pack
from clusterssl.pretrain import keep_freed_memory

COUNTS, SIZES = (2, 6), (224, 96)
SCALES = ((0.14, 1.0), (0.05, 0.14))
VIEWS = [(size, scale) for n, size, scale in zip(COUNTS, SIZES, SCALES, strict=True) for _ in range(n)]
System = Callable[[Sequence[int]], Any]
BARS = {
    "cost": Bar("what an image costs a worker", 3.3, "ms", most=True),
    "published": Bar("published pipeline's cost over ours", 6),
    "decoding": Bar("our cost over that of decoding alone", 2.1, most=True),
    "packed": Bar("published pipeline's cost over ours from packed shards", 12),
    "all": Bar("published pipeline's cost over ours with colour and blur on the same core", 1),
}


@dataclass(frozen=True)
class Options:
    """Comparison."""

    data_path: str = ""
    """folder of photographs; without it those of imagenet-sample.tar in $CLUSTERSSL_DATA"""
    images: int = 32
    """in one turn of every system"""
    short_side: int = 256
    """of the packed photographs, JPEG quality 90; 0: as they are"""
    repeats: int = 5
    out: str = "runs/bench/data_path.json"


def pil_blur(image: Image.Image) -> Image.Image:
    """With probability 0.5 PIL's blur of radius 0.1 to 2."""
    if random.random() > 0.5:
        return image
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def published(source: Source) -> System:
    """PIL images through torchvision's transforms, crop by crop."""

    def pipeline(size: int, scale: tuple[float, float]) -> Any:
        return transforms.Compose([
            transforms.RandomResizedCrop(size, scale=scale), transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), transforms.RandomGrayscale(0.2),
            pil_blur, transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    return _each(source, pil, [pipeline(size, scale) for size, scale in VIEWS])


def torchvision_v2(source: Source) -> System:
    """uint8 tensors through torchvision's transforms of the second version, crop by crop."""
    from torchvision.transforms import v2

    def pipeline(size: int, scale: tuple[float, float]) -> Any:
        return v2.Compose([
            v2.RandomResizedCrop(size, scale=scale, antialias=True), v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    return _each(source, decode_file, [pipeline(size, scale) for size, scale in VIEWS])


def albumentations(source: Source) -> System:
    """NumPy images through albumentations (OpenCV, one thread)."""
    import albumentations as alb
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)

    def pipeline(size: int, scale: tuple[float, float]) -> Any:
        made = alb.Compose([
            alb.RandomResizedCrop(size=(size, size), scale=scale), alb.HorizontalFlip(p=0.5),
            alb.ColorJitter((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2), p=0.8), alb.ToGray(p=0.2),
            alb.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5), alb.Normalize(MEAN, STD), ToTensorV2(),
        ])  # fmt: skip
        return lambda image: made(image=image)["image"]

    def opened(path: str) -> Any:
        return cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)

    return _each(source, opened, [pipeline(size, scale) for size, scale in VIEWS])


def lightly(source: Source) -> System:
    """lightly's transform of PIL images."""
    from lightly.transforms.swav_transform import SwaVTransform

    lows, highs = zip(*SCALES, strict=True)
    return _each(source, pil, [SwaVTransform(SIZES, COUNTS, lows, highs, cj_hue=0.2)])


def ours(source: Source, augment: bool = False) -> System:
    """A worker's batch; with `augment` all the rest, on this processor."""
    lows, highs = zip(*SCALES, strict=True)
    dataset = MultiCropDataset(source, MultiCrop(COUNTS, SIZES, lows, highs), seed=0)
    rest = Augment()

    def run(rows: Sequence[int]) -> Any:
        batch = dataset.__getitems__([(0, i) for i in rows])
        return rest(batch.crops, batch.params) if augment else batch

    return run


def _each(source: Source, opened: Callable[[str], Any], pipelines: Sequence[Callable[[Any], Any]]) -> System:
    def run(rows: Sequence[int]) -> Any:
        images = (opened(source.name(i)) for i in rows)
        return [[pipeline(image) for pipeline in pipelines] for image in images]

    return run


def pil(path: str) -> Image.Image:
    """A file as torchvision's ImageFolder opens it."""
    with Path(path).open("rb") as file:
        return Image.open(file).convert("RGB")


def systems(source: Source, packed: Source) -> dict[str, System]:
    """What is compared; packages where they are installed."""
    found: dict[str, System] = {
        "decode alone": lambda rows: [decode_file(source.name(i)) for i in rows],
        "ours": ours(source),
        "ours, packed": ours(packed),
        "ours and augmentation": ours(source, augment=True),
        "published": published(source),
        "torchvision v2": torchvision_v2(source),
    }
    for name, make in (("lightly", lightly), ("albumentations", albumentations)):
        try:
            found[name] = make(source)
        except ImportError:
            print(f"{name} is not installed: left out")
    return found


def summary(result: dict[str, Any]) -> Summary:
    """The result in words."""
    options, table = result["options"], result["ms_per_image"]
    ours = table["ours"]
    rows = [
        (name, quantity(one["cpu"], "ms"),
         f"{quantity(one['median'], 'ms')} ({one['low']:.3g} to {one['high']:.3g})", times(one["cpu"] / ours["cpu"]),
         times(one["published_over_this"]), times(one["over_decoding"]))
        for name, one in table.items()
    ]  # fmt: skip
    head = ("", "CPU time an image", "by the clock", "over ours", "published over this", "over decoding")
    return Summary(
        "What does an ImageNet photograph cost a loader worker, from the file to 2 x 224 + 6 x 96 crops?",
        "ours; published PIL pipeline, lightly, torchvision v2, albumentations, decoding alone",
        f"{options['images']} real photographs in the page cache, one thread; packed ones have a short side of "
        f"{options['short_side']} px; {often(options['repeats'])}. Ratios are those of CPU time.",
        [Table(head, rows)],
        [BARS["cost"].judge(ours["cpu"], f"published here: {quantity(table['published']['cpu'], 'ms')}"),
         BARS["published"].judge(ours["published_over_this"]), BARS["decoding"].judge(ours["over_decoding"]),
         BARS["packed"].judge(table["ours, packed"]["published_over_this"]),
         BARS["all"].judge(table["ours and augmentation"]["published_over_this"])],
        '"ours" leaves colour, blur, flip and normalisation to the training device; the others do all the work, as '
        '"ours and augmentation" does.',
    )  # fmt: skip


def main() -> None:
    options = options_of(Options, __doc__)
    torch.set_num_threads(1)
    keep_freed_memory()
    with folder_of_photos(options.data_path) as folder, tempfile.TemporaryDirectory() as target:
        source = open_source(folder)
        pack(folder, target, PackOptions(short_side=options.short_side, workers=1))
        small = open_source(target)
        rows = np.linspace(0, len(source) - 1, options.images).astype(int).tolist()
        calls = {name: partial(system, rows) for name, system in systems(source, small).items()}
        found = in_turns(calls, options.repeats)
    base, floor = found["published"].cpu, found["decode alone"].cpu
    table = {}
    for name, one in found.items():
        ms = {key: 1e3 * value / options.images for key, value in one._asdict().items()}
        table[name] = {**ms, "published_over_this": base / one.cpu, "over_decoding": one.cpu / floor}
    write_result(Path(options.out), {"options": cfg.plain(options), "ms_per_image": table}, summary)


if __name__ == "__main__":
    cfg.entry(main)
