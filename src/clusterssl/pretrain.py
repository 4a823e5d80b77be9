"""Wiring that all pretraining scripts share: from their flags to data, model, optimiser and run."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from clusterssl import dist
from clusterssl.auto_batch import FOLLOWING, with_batch
from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.closing import close_with_page
from clusterssl.compiling import compile_module, require_compiler
from clusterssl.config import command, gives, plain
from clusterssl.data import Augment, BadImages, Loader, MultiCrop, Resident, Source, fingerprint, open_source, reside
from clusterssl.data.devicedecode import DeviceDecode, gpu_decoder
from clusterssl.dist import World
from clusterssl.feed import Feed
from clusterssl.log import log_to_screen
from clusterssl.method import Method
from clusterssl.models.build import MultiCropNet, build_model, check_crop_sizes, resolve_stem
from clusterssl.models.weights import init_model
from clusterssl.optim import build_optimizer, warmup_cosine
from clusterssl.options import DataOptions, ModelOptions, OptimOptions, RunOptions, TrunkOptions, num_views
from clusterssl.parts import Parts, Schedule
from clusterssl.precision import Precision
from clusterssl.run import Run

logger = logging.getLogger(__name__)


class PretrainConfig(Protocol):
    """What `assemble` needs of a method's configuration."""

    @property
    def data(self) -> DataOptions: ...
    @property
    def model(self) -> TrunkOptions: ...
    @property
    def optim(self) -> OptimOptions: ...
    @property
    def run(self) -> RunOptions: ...


FREE = frozenset(
    ["data_path", "subset_file", "cache", "decode", "workers", "max_bad_fraction", "data_patience_minutes",
     "batch_size", "auto_batch", "accumulate", "epochs", "base_lr", "final_lr", "wd", "warmup_epochs", "start_warmup",
     "clip_grad", "init", "dump_path", "checkpoint_freq", "checkpoint_minutes", "log_freq", "stop_on_collapse",
     "tensorboard", "wandb", "report", "hang_minutes", "profile", "device", "dist_url", "timeout_minutes",
     "join_timeout_seconds", "world_size", "rank", "local_rank", "channels_last", "compile", "use_fp16", "amp_dtype",
     "grad_compression", "syncbn_process_group_size"]
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
        UserError: see `dist.join`.
    """
    keep_freed_memory()
    world = dist.join(
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
    """
    run, flags = Run(config.run.dump_path, world, config.run.mirrors), plain(config)
    follows = FOLLOWING if config.optim.auto_batch else frozenset()
    before = run.check(name, flags, frozenset(flags) - FREE - follows)
    data, patience_s = config.data, 60 * config.data.data_patience_minutes
    cache = "none" if data.decode == "gpu" and data.cache == "auto" else data.cache  # which would keep decoded images
    source = open_source(data.data_path, subset_file=data.subset_file, patience_s=patience_s, cache=cache)
    resident = reside(source, world.device, _workers(config)) if data.cache == "device" else None
    precision, planned = _precision(config, world), cast(dict[str, Any], {})
    if config.optim.auto_batch:
        config, planned = with_batch(config, len(source), world, make_model, precision, before)
    loader = make_loader(
        source, config, world, multicrop=multicrop, images_per_epoch=images_per_epoch, resident=resident,
        decode=_decode(source, config, world),
    )  # fmt: skip
    torch.manual_seed(config.run.seed)
    model = _placed(make_model(config), config, world)
    wrapped = distribute(model, world, config.run.grad_compression)
    ledger = BadImages(loader.source, run.folder / "bad_images.txt", max_bad_fraction=config.data.max_bad_fraction)
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    augment = augment or Augment()
    if config.model.compile and world.device.type == "cuda":  # on CPUs it is slower, see bench/augment.py
        augment = augment.fuse(layout)
    feed = Feed(loader, augment, world, layout, precision, ledger)
    method = make_method(wrapped, config, feed)
    flags = plain(config)
    facts = {"global_batch": loader.global_batch, "num_images": feed.num_images, **planned}
    facts |= {"steps_per_epoch": loader.batches_per_epoch, "dataset_hash": fingerprint(loader.source)}
    run.open(name, flags, facts, frozenset(flags) - FREE, follows)
    _tell(config, loader, model, world)
    optim = config.optim
    groups = parameter_groups(model, config) if parameter_groups else model.parameters()
    optimizer = build_optimizer(
        groups, optim.optimizer, optim.base_lr, optim.wd, momentum=optim.momentum, clip_grad=optim.clip_grad
    )
    rate = (learning_rate or _SCHEDULES[optim.schedule])(config, loader.batches_per_epoch)
    return Parts(method, wrapped, optimizer, feed, _schedule(config, rate), run, world, _record(config, model))


def make_loader(
    source: Source,
    config: T,
    world: World,
    *,
    multicrop: MultiCrop | None = None,
    images_per_epoch: Callable[[T, int], int] | None = None,
    resident: Resident | None = None,
    decode: DeviceDecode | None = None,
) -> Loader:
    """Batches of these images for one rank, see `Loader`; arguments and errors as of `assemble`."""
    data = config.data
    crops = multicrop or MultiCrop(
        nmb_crops=data.nmb_crops, size_crops=data.size_crops, min_scale_crops=data.min_scale_crops,
        max_scale_crops=data.max_scale_crops, color_jitter=data.color_jitter, color_jitter_p=data.color_jitter_p,
        gray_p=data.gray_p, blur_p=data.blur_p, flip_p=data.flip_p,
    )  # fmt: skip
    return Loader(
        source, crops, batch_size=config.optim.batch_size, accumulate=config.optim.accumulate,
        rank=world.rank, world_size=world.size, seed=config.run.seed, workers=_workers(config),
        pin_memory=world.device.type == "cuda", resident=resident, decode=decode,
        images_per_epoch=images_per_epoch(config, len(source)) if images_per_epoch else None,
    )  # fmt: skip


def _decode(source: Source, config: PretrainConfig, world: World) -> DeviceDecode | None:
    if config.data.decode == "cpu":
        return None
    return DeviceDecode(source, gpu_decoder(world.device), world.device)


def _workers(config: PretrainConfig) -> int:
    return min(config.data.workers, os.cpu_count() or 1)


def _placed(model: Any, config: PretrainConfig, world: World) -> Any:
    """The network with its first weights, on the device, its statistics shared as the flags say."""
    options = config.model
    if options.compile:
        require_compiler(world.device)
    check_crop_sizes(model.backbone, config.data.size_crops)
    if options.init:
        init_model(model, options.init)
    model.to(world.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    synchronise(model, options.sync_bn, options.syncbn_process_group_size, world.device)
    if options.compile:
        compile_module(model.backbone)
    return model


def _precision(config: PretrainConfig, world: World) -> Precision:
    if not config.model.use_fp16 or world.device.type != "cuda":
        return Precision()
    bf16 = torch.tensor(int(torch.cuda.is_bf16_supported(including_emulation=False)))
    everywhere = bool(dist.all_reduce_(bf16, "min"))  # ranks must not mix formats
    return Precision(torch.bfloat16 if config.model.amp_dtype == "bf16" and everywhere else torch.float16)


def _warmup_cosine(config: PretrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    optim = config.optim
    return partial(
        warmup_cosine, steps_per_epoch=steps_per_epoch, epochs=optim.epochs, warmup_epochs=optim.usable_warmup,
        start=optim.start_warmup, base=optim.base_lr, final=optim.final_lr,
    )  # fmt: skip


def _constant(config: PretrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    return lambda step: config.optim.base_lr


_SCHEDULES = {"cosine": _warmup_cosine, "constant": _constant}


def _schedule(config: PretrainConfig, learning_rate: Callable[[int], float]) -> Schedule:
    run = config.run
    return Schedule(
        epochs=config.optim.epochs, learning_rate=learning_rate, seed=run.seed, log_freq=run.log_freq,
        checkpoint_freq=run.checkpoint_freq, checkpoint_minutes=run.checkpoint_minutes,
        stop_on_collapse=run.stop_on_collapse, hang_minutes=run.hang_minutes, profile=run.profile,
    )  # fmt: skip


def _record(config: PretrainConfig, model: Any) -> dict[str, Any]:
    """What a reader of the checkpoint needs to build the network again."""
    sizes = [list(size) for size in config.data.size_crops]
    return {"arch": config.model.arch, "stem": str(model.backbone.stem_name), "size_crops": sizes, **model.record()}


def _tell(config: PretrainConfig, loader: Loader, model: nn.Module, world: World) -> None:
    if config.data.data_path == "digits" and not gives(None, "data_path"):
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
        logger.info(
            "--warmup_epochs %d: as long as the run or longer, using %d", optim.warmup_epochs, optim.usable_warmup
        )
    cores = os.cpu_count() or 1
    if config.data.workers > cores:
        logger.info("--workers %d: this machine has %d cores, using %d", config.data.workers, cores, cores)
