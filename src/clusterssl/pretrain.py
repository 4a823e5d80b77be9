"""Wiring that all pretraining scripts share: from their flags to data, model, optimiser and run."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from clusterssl import dist, from_flags, joining
from clusterssl.auto_batch import FOLLOWING, with_batch
from clusterssl.checkpoint import distribute
from clusterssl.closing import close_with_page
from clusterssl.config import command, gives, plain
from clusterssl.data import Augment, BadImages, Loader, MultiCrop, Resident, Source, fingerprint, open_source, reside
from clusterssl.dist import World
from clusterssl.feed import Feed
from clusterssl.from_flags import SCHEDULES, PretrainConfig, make_loader
from clusterssl.log import counted, log_to_screen
from clusterssl.method import Method
from clusterssl.models.build import MultiCropNet, build_model, resolve_stem
from clusterssl.optim import build_optimizer
from clusterssl.options import ModelOptions, RunOptions, num_views
from clusterssl.parts import Parts
from clusterssl.precision import Precision
from clusterssl.preemption import starting
from clusterssl.run import Run
from clusterssl.starts import SILENT

logger = logging.getLogger(__name__)


FREE = SILENT | frozenset(
    ["data_path", "subset_file", "decode", "batch_size", "accumulate", "epochs", "base_lr", "final_lr", "wd",
     "warmup_epochs", "start_warmup", "clip_grad", "init", "device", "channels_last", "compile", "cuda_graphs",
     "use_fp16", "amp_dtype", "grad_compression", "syncbn_process_group_size"]
)  # fmt: skip
"""flags that may differ when a run is resumed: the global batch and the number of images are compared instead"""


C = TypeVar("C")
T = TypeVar("T", bound=PretrainConfig)


def or_digits(published: C, digits: C, argv: Sequence[str] | None = None) -> C:
    """The defaults of a command line: the published ones, or those fit for the digits when it names no data."""
    words = sys.argv[1:] if argv is None else argv
    return published if gives(words, "data_path") or {"-h", "--help"} & set(words) else digits


@contextlib.contextmanager
def join(run: RunOptions) -> Iterator[World]:
    """Join the other ranks as the flags say, leave them at the end of the block, and write the page of what was done.

    Raises:
        UserError: see `joining.join`.
    """
    keep_freed_memory()
    world = joining.join(
        device=run.device, dist_url=run.dist_url, timeout_s=60 * run.timeout_minutes,
        join_timeout_s=run.join_timeout_seconds,
    )  # fmt: skip
    log_to_screen(world)
    try:
        yield world
    finally:
        dist.leave()
    if run.report and world.is_main:
        close_with_page(Path(run.dump_path))


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks: a training step on a CPU frees and asks anew for the same large tensors."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def prototype_net(nmb_prototypes: int | tuple[int, ...]) -> Callable[[PretrainConfig], MultiCropNet]:
    """Maker of SwAV's network with K prototypes, or one layer of them per entry."""

    def make(config: PretrainConfig) -> MultiCropNet:
        options = cast(ModelOptions, config.model)
        stem = resolve_stem(options.stem, max(max(size) for size in config.data.size_crops))
        return build_model(options.arch, stem, options.hidden_mlp, options.feat_dim, nmb_prototypes)

    return make


def assemble(
    name: str,
    config: T,
    world: World,
    make_model: Callable[[T], Any],
    make_method: Callable[[nn.Module, T, Feed], Method],
    *,
    multicrop: MultiCrop | None = None,
    augment: Augment | None = None,
    parameter_groups: Callable[[nn.Module, T], list[dict[str, Any]]] | None = None,
    learning_rate: Callable[[T, int], Callable[[int], float]] | None = None,
    images_per_epoch: Callable[[T, int], int] | None = None,
) -> Parts:
    """Build everything a run consists of; the run directory is read first and written last, when all is good.

    Args:
        name: of the method, as recorded in the run directory.
        config: the script's configuration.
        world: this process's place.
        make_model: from the configuration to a network with attribute `backbone` and a `record` of its heads.
        make_method: from the (distributed) model, the configuration and the images to the method.
        multicrop: crops and strengths of the augmentation, where they are not those of `config.data`.
        augment: normalisation, where it is not SwAV's.
        parameter_groups: of the optimiser, from the bare model; all parameters alike when None.
        learning_rate: from the configuration and the steps of an epoch to the rate of each step; as --schedule says
            when None.
        images_per_epoch: from the configuration and the number of images; each once when None.

    Raises:
        UserError: bad images, flags, weights or run directory, in the words of the part that found it.
        Stopped: a signal asked for it; see `starting`.
    """
    with starting():
        run, flags = Run(config.run.dump_path, world, config.run.mirrors), plain(config)
        follows = FOLLOWING if config.optim.auto_batch else frozenset()
        before = run.check(name, flags, frozenset(flags) - FREE - follows)
        source, resident = _images(config, world)
        precision, planned = from_flags.precision(config, world), cast(dict[str, Any], {})
        if config.optim.auto_batch:
            config, planned = with_batch(config, len(source), world, make_model, precision, before)
        loader = make_loader(
            source, config, world, multicrop=multicrop, images_per_epoch=images_per_epoch, resident=resident,
            decode=from_flags.decoder_on_device(source, config, world),
        )  # fmt: skip
        torch.manual_seed(config.run.seed)
        model = from_flags.placed(make_model(config), config, world)
        wrapped = distribute(model, world, config.run.grad_compression)
        feed = _feed(loader, augment or Augment(), config, world, precision, run.folder)
        method, optim = make_method(wrapped, config, feed), config.optim
        flags, facts = plain(config), {**_facts(feed), **planned}
        run.open(name, flags, facts, frozenset(flags) - FREE, follows)
        _tell(config, loader, model, world)
        optimizer = build_optimizer(
            parameter_groups(model, config) if parameter_groups else model.parameters(),
            optim.optimizer, optim.base_lr, optim.wd, momentum=optim.momentum, clip_grad=optim.clip_grad,
        )  # fmt: skip
        rate = (learning_rate or SCHEDULES[optim.schedule])(config, loader.batches_per_epoch)
        schedule, record = from_flags.schedule(config, rate), from_flags.record(config, model)
        return Parts(method, wrapped, optimizer, feed, schedule, run, world, record)


def _images(config: PretrainConfig, world: World) -> tuple[Source, Resident | None]:
    """The images, and the same on the training device where they shall live there."""
    data = config.data
    cache = "none" if data.decode == "gpu" and data.cache == "auto" else data.cache  # which would keep decoded images
    patience_s = 60 * data.data_patience_minutes
    source = open_source(data.data_path, subset_file=data.subset_file, patience_s=patience_s, cache=cache)
    workers = from_flags.number_of_workers(config)
    return source, reside(source, world.device, workers) if data.cache == "device" else None


def _feed(
    loader: Loader, augment: Augment, config: PretrainConfig, world: World, precision: Precision, folder: Path
) -> Feed:
    ledger = BadImages(loader.source, folder / "bad_images.txt", max_bad_fraction=config.data.max_bad_fraction)
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    if config.model.compiled and world.device.type == "cuda":  # on CPUs it is slower, see bench/augment.py
        augment = augment.fuse(layout)
    return Feed(loader, augment, world, layout, precision, ledger)


def _facts(feed: Feed) -> dict[str, Any]:
    """What a resume must find again."""
    return {
        "global_batch": feed.global_batch, "num_images": feed.num_images, "steps_per_epoch": feed.steps_per_epoch,
        "dataset_hash": fingerprint(feed.loader.source),
    }  # fmt: skip


def _tell(config: PretrainConfig, loader: Loader, model: nn.Module, world: World) -> None:
    if config.data.data_path == "digits" and not gives(None, "data_path"):
        full = command(Path(sys.argv[0]).name, config, type(config)())
        logger.info("no --data_path: training on the built-in digits, the same as\n  %s", full)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    ranks = f"{world.size} ranks ({world.launcher})" if world.size > 1 else "alone"
    logger.info("%s, %.1f M parameters, on %s, %s", config.model.arch, parameters, world.device, ranks)
    logger.info(
        "%d images from %s, %s each, %s a step, %s an epoch, %s; run directory %s",
        len(loader.source), config.data.data_path, counted(num_views(config.data), "crop"),
        counted(loader.global_batch, "image"), counted(loader.batches_per_epoch, "step"),
        counted(config.optim.epochs, "epoch"), config.run.dump_path,
    )  # fmt: skip
    optim = config.optim
    if optim.usable_warmup != optim.warmup_epochs:
        logger.info(
            "--warmup_epochs %d: as long as the run or longer, using a tenth of it, %g epochs",
            optim.warmup_epochs,
            optim.usable_warmup,
        )
    cores = os.cpu_count() or 1
    if config.data.workers > cores:
        logger.info("--workers %d: this machine has %d cores, using %d", config.data.workers, cores, cores)
