"""What the flags of a pretraining say of each part: loader, network, number format, schedule."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from clusterssl import dist
from clusterssl.batchnorm import synchronise
from clusterssl.compiling import compile_module, require_compiler, require_cuda_graphs
from clusterssl.data import Loader, MultiCrop, Resident, Source
from clusterssl.data.devicedecode import DeviceDecode, gpu_decoder
from clusterssl.dist import World
from clusterssl.models.build import check_crop_sizes
from clusterssl.models.weights import init_model
from clusterssl.optim import warmup_cosine
from clusterssl.options import DataOptions, OptimOptions, RunOptions, TrunkOptions
from clusterssl.parts import Schedule
from clusterssl.precision import Precision


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


T = TypeVar("T", bound=PretrainConfig)
Rate = Callable[[PretrainConfig, int], Callable[[int], float]]
"""from a configuration and the steps of an epoch to the learning rate of each step"""


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
    """Batches of these images for one rank, see `Loader`; arguments and errors as of `pretrain.assemble`."""
    data = config.data
    crops = multicrop or MultiCrop(
        nmb_crops=data.nmb_crops, size_crops=data.size_crops, min_scale_crops=data.min_scale_crops,
        max_scale_crops=data.max_scale_crops, color_jitter=data.color_jitter, color_jitter_p=data.color_jitter_p,
        gray_p=data.gray_p, blur_p=data.blur_p, flip_p=data.flip_p,
    )  # fmt: skip
    return Loader(
        source, crops, batch_size=config.optim.batch_size, accumulate=config.optim.accumulate,
        rank=world.rank, world_size=world.size, seed=config.run.seed, workers=number_of_workers(config),
        pin_memory=world.device.type == "cuda", resident=resident, decode=decode,
        images_per_epoch=images_per_epoch(config, len(source)) if images_per_epoch else None,
    )  # fmt: skip


def decoder_on_device(source: Source, config: PretrainConfig, world: World) -> DeviceDecode | None:
    """What decodes on the device what the workers only read; None where they decode."""
    if config.data.decode == "cpu":
        return None
    return DeviceDecode(source, gpu_decoder(world.device), world.device)


def number_of_workers(config: PretrainConfig) -> int:
    """Loader processes of a rank, at most one a core."""
    return min(config.data.workers, os.cpu_count() or 1)


def placed(model: Any, config: PretrainConfig, world: World) -> Any:
    """The network with its first weights, on the device, its statistics shared as the flags say."""
    options = config.model
    if options.compiled:
        require_compiler(world.device)
    if options.cuda_graphs:
        require_cuda_graphs(world, config.optim.accumulate)
    check_crop_sizes(model.backbone, config.data.size_crops)
    if options.init:
        init_model(model, options.init)
    model.to(world.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    synchronise(model, options.sync_bn, options.syncbn_process_group_size, world.device)
    if options.compiled:
        compile_module(model.backbone, options.cuda_graphs)
    return model


def precision(config: PretrainConfig, world: World) -> Precision:
    """The same number format on all ranks; a collective call on GPUs."""
    if not config.model.use_fp16 or world.device.type != "cuda":
        return Precision()
    bf16 = torch.tensor(int(torch.cuda.is_bf16_supported(including_emulation=False)))
    everywhere = bool(dist.all_reduce_(bf16, "min"))  # ranks must not mix formats
    return Precision(torch.bfloat16 if config.model.amp_dtype == "bf16" and everywhere else torch.float16)


def warmup_and_cosine(config: PretrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate of each step."""
    optim = config.optim
    return partial(
        warmup_cosine, steps_per_epoch=steps_per_epoch, epochs=optim.epochs, warmup_epochs=optim.usable_warmup,
        start=optim.start_warmup, base=optim.base_lr, final=optim.final_lr,
    )  # fmt: skip


def constant(config: PretrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    return lambda step: config.optim.base_lr


SCHEDULES: dict[str, Callable[[PretrainConfig, int], Callable[[int], float]]] = {
    "cosine": warmup_and_cosine,
    "constant": constant,
}
"""by --schedule"""


def schedule(config: PretrainConfig, learning_rate: Callable[[int], float]) -> Schedule:
    """When `fit` does what."""
    run = config.run
    return Schedule(
        epochs=config.optim.epochs, learning_rate=learning_rate, seed=run.seed, log_freq=run.log_freq,
        checkpoint_freq=run.checkpoint_freq, checkpoint_minutes=run.checkpoint_minutes,
        stop_on_collapse=run.stop_on_collapse, hang_minutes=run.hang_minutes, profile=run.profile,
    )  # fmt: skip


def record(config: PretrainConfig, model: Any) -> dict[str, Any]:
    """What a reader of the checkpoint needs to build the network again."""
    sizes = [list(size) for size in config.data.size_crops]
    return {"arch": config.model.arch, "stem": str(model.backbone.stem_name), "size_crops": sizes, **model.record()}
