"""Flags of SeLa's first version beside those all methods share, and how its published command lines read in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clusterssl import config as cfg
from clusterssl import options
from clusterssl.cluster.transport import TransportOptions
from clusterssl.config import require, require_numbers
from clusterssl.data import MEAN, Augment, MultiCrop, resize_for
from clusterssl.models.build import resolve_stem
from clusterssl.models.headed import HeadedNet, build_headed
from clusterssl.models.published import published_arch
from clusterssl.options import DataOptions, OptimOptions, RunOptions, TrunkOptions
from clusterssl.words import WORDS


@dataclass(frozen=True)
class ImageOptions(DataOptions):
    """Images and the one crop that is taken of each."""

    nmb_crops: tuple[int, ...] = (1,)
    min_scale_crops: tuple[float, ...] = (0.08,)
    color_jitter: float = 0.4
    """strength of brightness, contrast and saturation"""
    color_jitter_p: float = 1.0
    hue_jitter: float = 0.4
    """strength of the hue, as a fraction of the colour circle"""
    blur_p: float = 0.0
    workers: int = 6
    augs: int = 3
    """0: centre crops; 1: also flips; 2: random crops and flips; 3: also colours, greys and blurs"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, "augs", least=0, most=3)
        require(self.nmb_crops == (1,), "--nmb_crops: SeLa sees one crop of an image; --version 2 compares several")

    def multicrop(self) -> MultiCrop:
        """The crop with the augmentation of this level."""
        coloured, s = float(self.augs == 3), self.color_jitter
        kind = MultiCrop if self.augs > 1 else CentreCrop
        return kind(
            self.nmb_crops, self.size_crops, self.min_scale_crops, self.max_scale_crops,
            flip_p=self.flip_p if self.augs > 0 else 0.0, color_jitter=(s, s, s, self.hue_jitter),
            color_jitter_p=coloured * self.color_jitter_p, gray_p=coloured * self.gray_p, blur_p=coloured * self.blur_p,
        )  # fmt: skip


@dataclass(frozen=True)
class CentreCrop(MultiCrop):
    """Always the square in the middle that evaluations see."""

    def boxes(self, u_NVS: NDArray[np.float64], height: ArrayLike, width: ArrayLike) -> NDArray[np.int64]:
        """See `MultiCrop.boxes`."""
        sizes_N2 = np.stack(np.broadcast_arrays(*(np.reshape(x, -1) for x in (height, width))), 1)
        size = self.sizes[0]
        side_N = np.rint(sizes_N2.min(1) * max(size) / resize_for(size)).astype(np.int64)
        corner_N2 = (sizes_N2 - side_N[:, None]) // 2
        boxes_N4 = np.column_stack([corner_N2, side_N, side_N])
        return np.broadcast_to(boxes_N4[:, None], (len(u_NVS), u_NVS.shape[1], 4)).astype(np.int64)


@dataclass(frozen=True)
class SeLaOptions:
    """Labels."""

    hc: int = 1
    """heads, each with labels of its own"""
    ncl: int = 3000
    """clusters of each head"""
    lamb: float = 25.0
    """sharpness of the labels' assignment: probabilities are raised to this power"""
    nopts: int = 100
    """times at which the labels are computed anew, dense at the start and rare at the end"""
    label_pass: Literal["plain", "augmented"] = "plain"
    """what the labels are computed from: centre crops in evaluation mode, or as published augmented crops in training
    mode"""
    cifar: bool = False
    """the variant for CIFAR: evenly spaced times, at each the labels of one head (the epoch modulo the heads), and
    drops of the learning rate that depend on the number of epochs; without other flags also that variant's settings"""

    def __post_init__(self) -> None:
        require_numbers(self, "ncl", least=2)
        require_numbers(self, "hc", "lamb", "nopts", above=0)


@dataclass(frozen=True)
class StepOptions(OptimOptions):
    """Optimisation."""

    schedule: Literal["steps", "cosine", "constant"] = "steps"  # type: ignore[assignment]
    """of the learning rate; steps: a tenth after every --lrdrop epochs, and a thousandth from epoch 350 on"""
    lrdrop: int = 150
    """epochs between two drops"""
    lr_drops: tuple[int, ...] = ()
    """epochs at which the learning rate falls to a tenth, in place of --lrdrop"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, "lrdrop", least=1)


@dataclass(frozen=True)
class Config:
    """SeLa of 2020; --arch alexnet, alexnet_small, resnetv1 and resnetv2 are the published networks."""

    version: Literal["1"] = "1"
    """1: SeLa of ICLR 2020"""
    data: ImageOptions = ImageOptions()
    model: TrunkOptions = TrunkOptions(arch="alexnet")
    sela: SeLaOptions = SeLaOptions()
    transport: TransportOptions = TransportOptions()
    optim: StepOptions = StepOptions(201, 256, optimizer="sgd", base_lr=0.08, wd=1e-5, warmup_epochs=0)
    run: RunOptions = RunOptions()

    def make_model(self) -> HeadedNet:
        """The network with its heads; AlexNet's see what its last ReLU has cut."""
        stem = resolve_stem(self.model.stem, max(max(size) for size in self.data.size_crops))
        arch = published_arch("sela", self.model.arch)
        cut = arch.startswith("sela_alexnet")
        return build_headed(
            arch, stem, [self.sela.ncl] * self.sela.hc, relu_before_heads=cut, head_std=0.01 if cut else 0.0
        )

    def augment(self) -> Augment:
        """Normalisation."""
        if self.sela.cifar:
            return Augment((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        return Augment(MEAN, (0.229, 0.224, 0.225))


CIFAR = Config(
    data=ImageOptions(min_scale_crops=(0.2,)), sela=SeLaOptions(hc=20, ncl=128, lamb=10.0, nopts=400, cifar=True),
    transport=TransportOptions(sinkhorn_tol=0.01),
    optim=StepOptions(800, 64, optimizer="sgd", base_lr=0.05, wd=5e-4, warmup_epochs=0),
)  # fmt: skip
DIGITS = Config(
    data=ImageOptions(**{**vars(options.DIGITS_DATA), "nmb_crops": (1,), "hue_jitter": 0.125, "augs": 3}),
    model=options.DIGITS_TRUNK, sela=SeLaOptions(hc=5, ncl=100, nopts=33),
    optim=StepOptions(100, 100, optimizer="adamw", base_lr=3e-3, warmup_epochs=3, schedule="cosine"),
    run=RunOptions(dump_path="runs/sela_v1_digits"),
)  # fmt: skip

_RENAMED: dict[str, str | None] = {
    "lr": "base_lr", "exp": "dump_path", "resume": "init", "r": "init", "datadir": "data_path", "log_iter": "log_freq",
    "dtype": None, "modeldevice": None, "comment": None, "log_intv": None, "type": None,
}  # fmt: skip


def translate(argv: Sequence[str]) -> list[str]:
    """The words of a command line with the published names of flags replaced by ours.

    A line with --imagenet-path or --datadir, which name the images, is one of the published scripts: it is version 1,
    the numbers of --device are those of GPUs, and with the former --epochs counts one less than it trains for.

    Raises:
        UserError: what a published flag asks for does not exist here.
    """
    given = _given(argv)
    loose = given.get("", [])
    require(not loose, f"{' '.join(loose)!r}: not expected here, flags begin with --; see --help")
    for name in {"imagenet_path", "epochs"} & set(given):
        require(len(given[name]) == 1, f"--{name}: give one value")
    if {"imagenet_path", "datadir"} & set(given):
        given.pop("device", None)
        given["version"] = ["1"]
    if "datadir" in given:
        given.setdefault("cifar", ["true"])
    if "imagenet_path" in given:
        given.setdefault("data_path", [_training_images(*given.pop("imagenet_path"))])
        given["epochs"] = [str(int(*given.get("epochs", ["200"])) + 1)]
    if given.pop("cpu", None) is not None:
        given["device"] = ["cpu"]
    if given.pop("archspec", ["big"]) == ["small"]:
        given["arch"] = [*given.get("arch", ["alexnet"]), ""][:1]
        given["arch"][0] += "_small"
    for name, remedy in {"test_only": "eval_knn.py tests", "restart": "another --exp starts again"}.items():
        require(name not in given, f"--{name}: not here; {remedy}")
    words = [word for name, values in given.items() for word in ("-" * min(len(name), 2) + name, *values)]
    return cfg.translate(words, _RENAMED, powers=["wd"])


def is_version_1(words: Sequence[str]) -> bool:
    """Whether a translated command line asks for the first version."""
    return _given(words).get("version") == ["1"]


def defaults(words: Sequence[str]) -> Config:
    """What flags that a translated command line does not give are."""
    given = _given(words)
    if "cifar" in given and WORDS.get((given["cifar"] or ["true"])[0].lower(), True):
        return CIFAR
    return Config() if {"data_path", "help", "h"} & set(given) else DIGITS


def _given(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flags with their values, the last of equal ones; words before the first flag under the empty name."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in cfg.translate(argv, {}):
        if word.startswith("-") and not word.lstrip("-.")[:1].isdigit():
            name, equals, value = word.lstrip("-").partition("=")
            given[name] = [value] if equals else []
        else:
            given.setdefault(name, []).append(word)
    return given


def _training_images(folder: str) -> str:
    """The published script looks for the images in train/."""
    return str(Path(folder, "train")) if Path(folder, "train").is_dir() else folder
