"""Wiring that all pretraining scripts share: from their flags to data, model, optimiser and run."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from clusterssl import dist
from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.config import command, gives, plain
from clusterssl.data import Augment, Loader, MultiCrop, open_source
from clusterssl.dist import World
from clusterssl.engine import Method, Parts, Precision, Schedule
from clusterssl.log import log_to_screen
from clusterssl.models.build import MultiCropNet, build_model, check_crop_sizes, resolve_stem
from clusterssl.models.weights import init_model
from clusterssl.optim import build_optimizer, warmup_cosine
from clusterssl.options import DataOptions, ModelOptions, OptimOptions, RunOptions, num_views
from clusterssl.run import Run

logger = logging.getLogger(__name__)


class PretrainConfig(Protocol):
    """What `assemble` needs of a method's configuration."""

    @property
    def data(self) -> DataOptions: ...
    @property
    def model(self) -> ModelOptions: ...
    @property
    def optim(self) -> OptimOptions: ...
    @property
    def run(self) -> RunOptions: ...


FREE = frozenset(
    ["data_path", "workers", "max_bad_fraction", "batch_size", "accumulate", "epochs", "base_lr", "final_lr", "wd",
     "warmup_epochs", "start_warmup", "init", "dump_path", "checkpoint_freq", "checkpoint_minutes", "log_freq",
     "stop_on_collapse", "device", "dist_url", "timeout_minutes", "world_size", "rank", "local_rank", "channels_last",
     "compile", "use_fp16", "amp_dtype", "syncbn_process_group_size"]
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
    """Join the other ranks as the flags say, and leave them at the end of the block."""
    keep_freed_memory()
    world = dist.join(device=run.device, dist_url=run.dist_url, timeout_s=60 * run.timeout_minutes)
    log_to_screen(world)
    try:
        yield world
    finally:
        dist.leave()


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks: a training step on a CPU frees and asks anew for the same large tensors."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def assemble(
    name: str,
    config: T,
    world: World,
    nmb_prototypes: int | tuple[int, ...],
    make_method: Callable[[nn.Module, T, int], Method],
) -> Parts:
    """Build everything a run consists of; the run directory is touched last, when all flags have proved good.

    Args:
        name: of the method, as recorded in the run directory.
        config: the script's configuration.
        world: this process's place.
        nmb_prototypes: K, or one K per head.
        make_method: from the (distributed) model, the configuration and the steps of an epoch to the method.

    Raises:
        UserError: bad images, flags, weights or run directory, in the words of the part that found it.
    """
    torch.manual_seed(config.run.seed)
    loader = _loader(config, world)
    model = _model(config, nmb_prototypes, world)
    wrapped = distribute(model, world)
    method = make_method(wrapped, config, loader.batches_per_epoch)
    run = Run(config.run.dump_path, world)
    flags = plain(config)
    facts = {"global_batch": loader.global_batch, "num_images": len(loader.source)}
    run.open(name, flags, facts, frozenset(flags) - FREE)
    _tell(config, loader, model, world)
    optim = config.optim
    optimizer = build_optimizer(model.parameters(), optim.optimizer, optim.base_lr, optim.wd)
    return Parts(
        method, wrapped, optimizer, loader, Augment(), _schedule(config, loader), _precision(config, world), run,
        world, torch.channels_last if config.model.channels_last else torch.contiguous_format, _record(config, model),
    )  # fmt: skip


def _loader(config: PretrainConfig, world: World) -> Loader:
    data = config.data
    crops = MultiCrop(
        nmb_crops=data.nmb_crops, size_crops=data.size_crops, min_scale_crops=data.min_scale_crops,
        max_scale_crops=data.max_scale_crops, color_jitter=data.color_jitter, color_jitter_p=data.color_jitter_p,
        gray_p=data.gray_p, blur_p=data.blur_p, flip_p=data.flip_p,
    )  # fmt: skip
    return Loader(
        open_source(data.data_path), crops, batch_size=config.optim.batch_size, accumulate=config.optim.accumulate,
        rank=world.rank, world_size=world.size, seed=config.run.seed, workers=min(data.workers, os.cpu_count() or 1),
        pin_memory=world.device.type == "cuda",
    )  # fmt: skip


def _model(config: PretrainConfig, nmb_prototypes: int | tuple[int, ...], world: World) -> MultiCropNet:
    options = config.model
    stem = resolve_stem(options.stem, max(max(size) for size in config.data.size_crops))
    model = build_model(options.arch, stem, options.hidden_mlp, options.feat_dim, nmb_prototypes)
    check_crop_sizes(model.backbone, config.data.size_crops)
    if options.init:
        init_model(model, options.init)
    model.to(world.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    synchronise(model, options.sync_bn, options.syncbn_process_group_size, world.device)
    if options.compile:
        model.backbone.compile()
    return model


def _precision(config: PretrainConfig, world: World) -> Precision:
    if not config.model.use_fp16 or world.device.type != "cuda":
        return Precision()
    bf16 = torch.tensor(int(torch.cuda.is_bf16_supported(including_emulation=False)))
    everywhere = bool(dist.all_reduce_(bf16, "min"))  # ranks must not mix formats
    return Precision(torch.bfloat16 if config.model.amp_dtype == "bf16" and everywhere else torch.float16)


def _schedule(config: PretrainConfig, loader: Loader) -> Schedule:
    optim, run = config.optim, config.run

    def rate(step: int) -> float:
        return warmup_cosine(
            step, steps_per_epoch=loader.batches_per_epoch, epochs=optim.epochs, warmup_epochs=optim.usable_warmup,
            start=optim.start_warmup, base=optim.base_lr, final=optim.final_lr,
        )  # fmt: skip

    return Schedule(
        epochs=optim.epochs, learning_rate=rate, seed=run.seed, log_freq=run.log_freq,
        checkpoint_freq=run.checkpoint_freq, checkpoint_minutes=run.checkpoint_minutes,
        stop_on_collapse=run.stop_on_collapse, max_bad_fraction=config.data.max_bad_fraction,
    )  # fmt: skip


def _record(config: PretrainConfig, model: MultiCropNet) -> dict[str, Any]:
    sizes = [list(size) for size in config.data.size_crops]
    return {"arch": config.model.arch, "stem": str(model.backbone.stem_name), "size_crops": sizes}


def _tell(config: PretrainConfig, loader: Loader, model: MultiCropNet, world: World) -> None:
    if not gives(None, "data_path"):
        full = command(Path(sys.argv[0]).name, config, type(config)())
        logger.info("no --data_path: training on the built-in digits, the same as\n  %s", full)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info("%s, %.1f M parameters, on %s, %d ranks (%s)", config.model.arch, parameters, world.device, world.size,
                world.launcher)  # fmt: skip
    logger.info(
        "%d images from %s, %d crops each, %d images a step, %d steps an epoch, %d epochs; run directory %s",
        len(loader.source), config.data.data_path, num_views(config.data), loader.global_batch,
        loader.batches_per_epoch,
        config.optim.epochs, config.run.dump_path,
    )  # fmt: skip
    optim = config.optim
    if optim.usable_warmup != optim.warmup_epochs:
        logger.info("--warmup_epochs %d: longer than the run, using %d", optim.warmup_epochs, optim.usable_warmup)
    cores = os.cpu_count() or 1
    if config.data.workers > cores:
        logger.info("--workers %d: this machine has %d cores, using %d", config.data.workers, cores, cores)
