"""What the evaluation scripts share: flags, the network to evaluate, the data, the record of the result."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from clusterssl import dist, joining
from clusterssl.config import gives, require, require_numbers
from clusterssl.data import STD, open_source
from clusterssl.data.source import Source
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.log import log_to_screen
from clusterssl.models.build import build_backbone, check_crop_sizes, resolve_stem
from clusterssl.models.identify import describe
from clusterssl.models.weights import load_backbone_state, read_weights

logger = logging.getLogger(__name__)

NO_DATA = "/path/to/imagenet"
_SHOWN_FOLDERS = 5


@dataclass(frozen=True)
class NetworkOptions:
    """Network to evaluate."""

    pretrained: str = ""
    """checkpoint (file, run directory or URL, own or published); evaluations without one are of an untrained network"""
    arch: str = "resnet50"
    """architecture; without this flag the one that the checkpoint names or shows"""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """first layers of a ResNet; auto: those of the checkpoint, else small up to 64 px"""
    image_size: int = 0
    """side of the crops in pixels; 0: the largest crop of the checkpoint's own run if it says, else 224 (digits: 32)"""

    def __post_init__(self) -> None:
        require_numbers(self, "image_size", least=0)


@dataclass(frozen=True)
class DataOptions:
    """Images."""

    data_path: str = NO_DATA
    """folder with train/ and val/, each of class folders or packed; or "digits" (built in), or "synthetic" """
    val_split: str = "val"
    """what the classifier is tested on: a folder beside train/, or a split of the digits (val, test)"""
    workers: int = 10
    """loader processes per rank; at most the number of cores is used, 0 loads in this process"""

    def __post_init__(self) -> None:
        require_numbers(self, "workers", least=0)

    @property
    def usable_workers(self) -> int:
        """Loader processes that the machine has cores for; none for images that are in memory already."""
        in_memory = self.data_path.split(":")[0] in ("digits", "synthetic")
        return 0 if in_memory else min(self.workers, os.cpu_count() or 1)


@dataclass(frozen=True)
class LaunchOptions:
    """Ranks and device."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    dist_url: str = "env://"
    """where ranks meet; env:// reads torchrun's or Slurm's variables"""
    join_timeout_seconds: float = 50.0
    """seconds after which, at the start, missing ranks are named and the others end"""
    world_size: int = -1
    """accepted and ignored: the launcher says it"""
    rank: int = 0
    """accepted and ignored: the launcher says it"""
    local_rank: int = 0
    """accepted and ignored: the launcher says it"""

    def __post_init__(self) -> None:
        require_numbers(self, "join_timeout_seconds", above=0)

    def join(self) -> World:
        """Join the other ranks as the flags say, and show what is logged."""
        world = joining.join(device=self.device, dist_url=self.dist_url, join_timeout_s=self.join_timeout_seconds)
        log_to_screen(world)
        return world


@dataclass(frozen=True)
class Network:
    """A backbone ready to evaluate."""

    backbone: nn.Module
    arch: str
    stem: str
    image_size: tuple[int, int]
    fingerprint: str
    """of all weights and statistics, to recognise the same network"""
    std: tuple[float, float, float] = STD
    """of the pixels in 0..1 by channel, as the network was trained"""
    left_aside: tuple[str, ...] = ()
    """names in the checkpoint that are not of the backbone"""


def open_network(
    options: NetworkOptions, *, data_path: str, seed: int, argv: Sequence[str] | None = None, tell: bool = True
) -> Network:  # fmt: skip
    """Build the backbone and load its weights, strictly.

    Args:
        options: flags.
        data_path: for the image size, where nothing else tells it.
        seed: of the weights, when there is no checkpoint.
        argv: command line, that of this process when None; --arch and --stem give way to what the checkpoint says
            unless it sets them.
        tell: log what of the checkpoint is left aside; the caller does otherwise, who may use it.

    Raises:
        UserError: unreadable or unfitting checkpoint, unknown architecture, or a flag that contradicts the checkpoint.
    """
    require(0 <= seed < 2**31, f"--seed {seed}: must lie between 0 and {2**31 - 1}")
    state, meta = read_weights(options.pretrained) if options.pretrained else ({}, {})
    look = describe(state, meta) if state else None
    given = {name for name in ("arch", "stem") if gives(argv, name)}
    arch = _agreed("arch", options.arch, look.arch if look else None, given, meta, options.pretrained)
    side = options.image_size or (32 if data_path == "digits" else 224)
    image_size = (side, side)
    if not options.image_size and meta.get("size_crops"):
        height, width = max(meta["size_crops"], key=lambda size: size[0] * size[1])
        image_size = (int(height), int(width))
    fallback = resolve_stem(options.stem, max(image_size))
    stem = _agreed("stem", fallback, look.stem if look else None, given, meta, options.pretrained)
    torch.manual_seed(seed)
    backbone = build_backbone(arch, stem)
    aside: list[str] = []
    if state:
        aside = load_backbone_state(backbone, state, options.pretrained, tell=tell)
    elif dist.rank() == 0:
        logger.warning("warning: no --pretrained, the network is untrained: %s with random weights", arch)
    check_crop_sizes(backbone, [image_size], "--image_size")
    logger.info("%s, stem %s, images of %dx%d", arch, backbone.stem_name, *image_size)
    backbone.requires_grad_(False)
    return Network(backbone, arch, stem, image_size, fingerprint(backbone), pixel_std(state), tuple(aside))


def require_alone(world: World, script: str) -> None:
    """Refuse to work on several ranks."""
    require(world.size == 1, f"{script} works in one process; start it without torchrun or srun -n")


def pixel_std(state: Mapping[str, Any]) -> tuple[float, float, float]:
    """What the pixels were divided by when a checkpoint was trained; SwAV and its kin have a figure of their own."""
    own = not state or any(name.startswith(("projection_head.", "prototypes.")) for name in state)
    return STD if own else (0.229, *STD[1:])


def _agreed(
    flag: str, value: str, seen: str | None, given: Collection[str], meta: dict[str, Any], path: str
) -> str:  # fmt: skip
    """The flag's value, or what the checkpoint says where the flag is not given."""
    explicit = flag in given and value != "auto"
    if explicit or seen is None:
        if flag in meta and meta[flag] != value:
            raise UserError(f"--{flag} {value}: {path} was trained with {flag} {meta[flag]}; leave the flag out")
        return value
    if seen != value:
        logger.info("--%s %s: taken from %s", flag, seen, path)
    return seen


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()[:16]


def open_splits(options: DataOptions) -> tuple[Source, Source]:
    """Labelled training images and images to test on, with classes numbered alike.

    Raises:
        UserError: missing or unlabelled data, or classes that only one of both has.
    """
    where, splits = options.data_path, ("train", options.val_split)
    if where == NO_DATA:
        raise UserError("--data_path: name the folder that holds train/ and val/, or digits for the built-in images")
    _check_layout(Path(where).expanduser(), splits)
    train, val = (open_source(where, split=split) for split in splits)
    for split, source in zip(splits, (train, val), strict=True):
        if not source.classes or int(source.labels.min()) < 0:
            raise UserError(f"{where}: {split} has no labels; sort its images into one folder per class")
    for split, more, other, fewer in ((splits[1], val, "train", train), ("train", train, splits[1], val)):
        foreign = sorted(set(more.classes) - set(fewer.classes))
        if foreign:
            raise UserError(
                f"{where}: {len(foreign)} of {len(more.classes)} classes of {split} are not in {other} (first: "
                f"{foreign[0]}); both need a folder for every class"
            )
    return train, val


def _check_layout(path: Path, splits: Sequence[str]) -> None:
    """Say what a folder holds where it should hold one folder for each split."""
    if not path.is_dir() or all((path / split).is_dir() for split in splits):
        return
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = [entry.name + "/" for entry in inside if entry.is_dir()]
    shown = ", ".join(folders[:_SHOWN_FOLDERS]) + (" ..." if len(folders) > _SHOWN_FOLDERS else "")
    found = f"{len(folders)} folders ({shown})" if folders else "no folders"
    raise UserError(
        f"--data_path {path}: expected {'/ and '.join(splits)}/, each with one folder of images per class; found "
        f"{found} and {len(inside) - len(folders)} files"
    )


def check_writable(folder: str | Path, flag: str = "--dump_path") -> None:
    """Try whether a folder for results can be made and written (rank 0), before hours are spent; a collective call.

    Raises:
        UserError: it cannot be written.
    """
    problem = None
    try:
        if not dist.rank():
            path = Path(folder).absolute()
            with tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
                pass
    except OSError as error:
        problem = UserError(f"{flag} {folder}: cannot be written ({first_line(error)}); choose another")
    dist.raise_together(problem)


def append_evaluation(
    folder: str | Path, kind: str, numbers: dict[str, Any], network: Network, options: NetworkOptions, data: DataOptions
) -> None:  # fmt: skip
    """Append one record to evaluations.jsonl (rank 0), unless the file holds the same result already.

    Args:
        folder: where the file is.
        kind: of the evaluation: "knn", "linear".
        numbers: result, e.g. {"k": 20, "top1": 95.0, "top5": 99.0}.
        network, options, data: what was evaluated.

    Raises:
        UserError: the folder cannot be written.
    """
    if dist.rank():
        return
    record = {
        "eval": kind, **numbers, "pretrained": options.pretrained, "arch": network.arch, "stem": network.stem,
        "image_size": list(network.image_size), "network": network.fingerprint, "data_path": data.data_path,
        "split": data.val_split,
    }  # fmt: skip
    path = Path(folder) / "evaluations.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if record in [_untimed(line) for line in text.splitlines()]:
            return
        torn = "\n" if text and not text.endswith("\n") else ""
        with path.open("a") as file:
            file.write(torn + json.dumps({"time": round(time.time(), 3), **record}) + "\n")
    except OSError as error:
        raise UserError(f"{path}: could not be written ({first_line(error)})") from error


def _untimed(line: str) -> dict[str, Any]:
    try:
        return {key: value for key, value in json.loads(line).items() if key != "time"}
    except (ValueError, AttributeError):  # a line cut short by a kill
        return {}
