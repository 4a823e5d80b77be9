"""Flags of Self-Classifier beside those all methods share, and how its published command lines read in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from clusterssl import config as cfg
from clusterssl.config import Size, require, require_numbers
from clusterssl.data import MEAN, Augment, MultiCrop
from clusterssl.errors import UserError
from clusterssl.models.build import resolve_stem
from clusterssl.models.selfclassifier import SelfClassifierNet, build_selfclassifier
from clusterssl.optim import decay_groups
from clusterssl.options import DataOptions, ModelOptions, OptimOptions, num_views
from clusterssl.rendezvous import ranks_per_node


@dataclass(frozen=True)
class ViewOptions(DataOptions):
    """Images and views: two global ones, which are compared with all, then local ones, compared with the global."""

    nmb_crops: tuple[int, ...] = (2, 6)
    size_crops: tuple[Size, ...] = (Size(224, 224), Size(96, 96))
    min_scale_crops: tuple[float, ...] = (0.4, 0.05)
    max_scale_crops: tuple[float, ...] = (1.0, 0.4)
    color_jitter: float = 0.4
    """strength s of the colour jitter: brightness and contrast s, saturation s / 2, hue s / 4"""
    blur_p: tuple[float, ...] = (0.1, 1.0, 0.5)  # type: ignore[assignment]  # one number cannot say it
    """probability of a Gaussian blur of radius 0.1 to 2 pixels, of the views in order; the last number is also that of
    all further views"""
    solarize_p: tuple[float, ...] = (0.0, 0.2, 0.0)
    """probability of inverting pixels of half brightness and more, likewise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        words = " ".join(map(str, self.nmb_crops))
        require(self.nmb_crops[0] == 2, f"--nmb_crops {words}: the first number counts the global views, which are 2")

    def multicrop(self) -> MultiCrop:
        """Bicubic crops with these strengths."""
        s, views = self.color_jitter, num_views(self)
        return MultiCrop(
            self.nmb_crops, self.size_crops, self.min_scale_crops, self.max_scale_crops, self.flip_p,
            (s, s, s / 2, s / 4), self.color_jitter_p, self.gray_p, _per_view(self.blur_p, views),
            _per_view(self.solarize_p, views), interpolation="bicubic",
        )  # fmt: skip


def _per_view(values: tuple[float, ...], views: int) -> tuple[float, ...]:
    return tuple(values[min(view, len(values) - 1)] for view in range(views))


@dataclass(frozen=True)
class NetOptions(ModelOptions):
    """Network."""

    hidden_mlp: int = 4096
    """hidden width of the head"""
    num_hidden: int = 2
    """linear layers of the head; 0: none, the backbone's features are classified"""
    use_bn: bool = True
    """BatchNorm after the hidden layers of the head"""
    no_leaky: bool = False
    """ReLU in the head instead of LeakyReLU"""
    cls_size: tuple[int, ...] = (1000, 2000, 4000, 8000)
    """classes of each classifier"""
    num_cls: int = 0
    """number of classifiers, which must be that of --cls_size; 0: that"""
    fixed_cls: bool = False
    """keep the classifiers' random weights"""

    def __post_init__(self) -> None:
        super().__post_init__()
        words = " ".join(map(str, self.cls_size))
        require_numbers(self, "cls_size", least=2)
        require_numbers(self, "num_hidden", least=0)
        fits = self.num_cls in (0, len(self.cls_size))
        require(fits, f"--num_cls {self.num_cls} --cls_size {words}: give one size for each classifier")

    def build(self, size_crops: tuple[Size, ...]) -> SelfClassifierNet:
        """The network for crops of these sizes."""
        stem = resolve_stem(self.stem, max(max(size) for size in size_crops))
        return build_selfclassifier(
            self.arch, stem, self.cls_size, self.num_hidden, self.hidden_mlp, self.feat_dim, self.use_bn,
            self.no_leaky, self.fixed_cls,
        )  # fmt: skip


@dataclass(frozen=True)
class StepOptions(OptimOptions):
    """Optimisation."""

    start_warmup: float = 0.3
    final_lr: float = 0.0048
    no_bias_wd: bool = False
    """no weight decay of biases and of BatchNorm's parameters"""
    bbone_wd: float | None = None
    """weight decay of the backbone; that of all others when not given"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, "bbone_wd", least=0)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser."""
        return decay_groups(model, no_bias_wd=self.no_bias_wd, bbone_wd=self.bbone_wd)


AUGMENT = Augment(MEAN, (0.229, 0.224, 0.225))
"""with ImageNet's usual normalisation"""
DIGITS_VIEWS = ViewOptions(
    data_path="digits", nmb_crops=(2,), size_crops=(Size(32, 32),), min_scale_crops=(0.4,), max_scale_crops=(1.0,),
    color_jitter=0.5, gray_p=0.0, blur_p=(0.5,), solarize_p=(0.0,), flip_p=0.0, workers=0,
)  # fmt: skip
DIGITS_NET = NetOptions(arch="conv4", hidden_mlp=128, feat_dim=32, cls_size=(20, 40, 60))
DIGITS_STEPS = StepOptions(60, 100, optimizer="adamw", base_lr=3e-3, final_lr=0.0, warmup_epochs=3, start_warmup=0.0)

_RENAMED: dict[str, str | None] = {
    "a": "arch", "j": "workers", "p": "log_freq", "print_freq": "log_freq", "lr": "base_lr",
    "learning_rate": "base_lr", "weight_decay": "wd", "save_path": "dump_path", "pretrained": "init",
    "dim": "feat_dim", "hidden_dim": "hidden_mlp", "use_amp": "use_fp16", "start_epoch": None, "dist_backend": None,
    "gpu": None, "multiprocessing_distributed": None, "use_lsf_env": None, "patch_size": None, "resume": None,
    "rm_pretrained_cls": None,
}  # fmt: skip
_SWITCHES = {"cos", "lars", "sgd", "use_amp", "multiprocessing_distributed", "use_lsf_env", "rm_pretrained_cls"}
_YES_OR_NO = ("true", "on", "1", "yes", "false", "off", "0", "no")
_SCALES = {"global_crops_scale": ["0.4", "1.0"], "local_crops_scale": ["0.05", "0.4"]}
_TOLD_TOGETHER = {"cos", "lars", "sgd", "local_crops_number", *_SCALES}
_DEFAULTS = (
    "--epochs 800 --workers 4 --log_freq 16 --seed 0 --cls_size 1000 --num_hidden 3 --use_bn false --use_fp16 false "
    "--schedule constant --optimizer adamw"
)
"""the published script's, where they are not ours"""

Given = dict[str, list[str]]


def translate(argv: Sequence[str], config: Any, env: Mapping[str, str] | None = None) -> list[str]:
    """The words of a command line with the published names of flags replaced by ours.

    A line that names the folder of images without a flag before it is one of the published script: flags that it does
    not give have that script's defaults, and its batch is that of a node.

    Args:
        argv: words after the program's name.
        config: of our script, for the types of our flags.
        env: where the launcher tells the number of ranks on a node; the process's when None.

    Raises:
        UserError: a word that belongs to no flag, or what the published flag asks for does not exist here.
    """
    kinds = {flag.name: flag.type for flag in cfg.flags(config)}
    switches = _SWITCHES | {name for name, kind in kinds.items() if kind is bool}
    given, loose = _sorted(argv, switches, {*_SCALES, *(name for name, kind in kinds.items() if "tuple" in str(kind))})
    _refuse(given)
    words: list[str] = []
    if loose:
        require(len(loose) == 1, f"{loose[-1]!r}: not expected here, the folder of images is {loose[0]!r}")
        words = [*_DEFAULTS.split(), "--data_path", loose[0]]
        given = _as_published(given)
    words += [*_crops(given), *_optimisation(given)]
    if "sync_bn" not in given and given.get("syncbn_process_group_size", ["0"]) != ["0"]:
        words += ["--sync_bn", "apex"]
    for name, values in given.items():
        if name == "b":
            words += ["--batch_size", _images_per_rank(values, dict(os.environ if env is None else env))]
        elif name not in _TOLD_TOGETHER:
            words += ["-" * min(len(name), 2) + name, *values]
    return cfg.translate(words, _RENAMED)


def _as_published(given: Given) -> Given:
    """With what the published script takes where it is not told: a batch, and a cosine that ends where it begins."""
    rate = given.get("lr") or given.get("learning_rate") or ["4.8"]
    batch = given.get("b") or given.get("batch_size") or ["256"]
    return {"final_lr": rate, **{name: values for name, values in given.items() if name != "batch_size"}, "b": batch}


def _sorted(argv: Sequence[str], switches: set[str], lists: set[str]) -> tuple[Given, list[str]]:
    """Flags with their values, the last of equal ones, and the words that are no flag's."""
    given: Given = {}
    loose: list[str] = []
    name = ""
    for word in cfg.translate(argv, {}):
        if word.startswith("-") and not word.lstrip("-.")[:1].isdigit():
            name, equals, value = word.lstrip("-").partition("=")
            given.pop(name, None)  # so that the order is that of the last ones
            given[name] = [value] if equals else []
            continue
        if name in switches:
            fits = not given[name] and word.lower() in _YES_OR_NO
        else:
            fits = name != "" and (not given[name] or (name in lists and word[:1] in "0123456789."))
        (given[name] if fits else loose).append(word)
    return given, loose


def _refuse(given: Given) -> None:
    if (given.get("resume") or [""])[0]:
        raise UserError("--resume: a run goes on by itself in its --dump_path; to start from weights use --init")
    if "rm_pretrained_cls" in given:
        raise UserError(
            "--rm_pretrained_cls: not here; --init takes the classifiers whose --cls_size is that of the file"
        )
    patch = (given.get("patch_size") or ["16"])[0]
    require(patch == "16", f"--patch_size {patch}: the ViTs have patches of 16; others are --arch timm:NAME")


def _crops(given: Given) -> list[str]:
    """Our four lists of crops, where a published flag tells any of them."""
    if not {"local_crops_number", *_SCALES} & set(given):
        return []
    scales = [given.get(name, default) for name, default in _SCALES.items()]
    for name, pair in zip(_SCALES, scales, strict=True):
        require(len(pair) == 2, f"--{name} {' '.join(pair)}: give the smallest and the largest area")
    number = (given.get("local_crops_number") or ["6"])[0]
    few = 1 if number == "0" else 2
    least, most = zip(*scales, strict=True)
    lists = {"nmb_crops": ("2", number), "size_crops": ("224", "96"), "min_scale_crops": least, "max_scale_crops": most}
    return [word for name, values in lists.items() for word in (f"--{name}", *values[:few])]


def _optimisation(given: Given) -> list[str]:
    """Our optimiser and schedule, where published switches tell them."""
    cos, lars, sgd = (name in given and not set(given[name]) & {"false", "0"} for name in ("cos", "lars", "sgd"))
    require(sgd or not lars, "--lars without --sgd: LARS is SGD here; give both")
    return [*(["--optimizer", "lars" if lars else "sgd"] if sgd else []), *(["--schedule", "cosine"] if cos else [])]


def _images_per_rank(per_node: list[str], env: dict[str, str]) -> str:
    ranks = ranks_per_node(env)
    number = " ".join(per_node)
    fits = number.isdigit() and int(number) >= ranks
    require(fits, f"-b {number}: needs a number of images per node, at least one for each of its {ranks} ranks")
    return str(int(number) // ranks)
