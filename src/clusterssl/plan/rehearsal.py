"""One step of a training, run on tensors without memory: its own code tells what it allocates and sends."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from clusterssl import dist
from clusterssl.batchnorm import same_on_all_ranks, shared_by_all, synchronise
from clusterssl.checkpoint import bare
from clusterssl.data import Augment, BadImages
from clusterssl.data.unseen import Unseen
from clusterssl.dist import World
from clusterssl.engine import AGREED
from clusterssl.feed import Feed
from clusterssl.from_flags import make_loader
from clusterssl.models.build import check_crop_sizes
from clusterssl.models.weights import published_state_dict
from clusterssl.optim import build_optimizer
from clusterssl.plan.blueprint import Blueprint
from clusterssl.plan.watch import Message, Watch, tensor_bytes
from clusterssl.precision import Precision

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""of DistributedDataParallel, in bytes"""


@dataclass
class Rehearsed:
    """Of one rank."""

    method: Any
    feed: Feed
    memory: dict[str, int]
    """bytes that live through the whole step, by what they are for"""
    peak: int
    """bytes at the worst moment of a step, those included"""
    files: dict[str, int]
    """bytes of a checkpoint: of the file that all share, and of each rank's own, if there is one"""
    messages: list[Message] = field(default_factory=list)
    """collectives of a step"""


def rehearse(blueprint: Blueprint, images: int, ranks: int, *, gpu: bool) -> Rehearsed:
    """One step as it is once queues are full and the optimiser has its state.

    Args:
        blueprint: of the training.
        images: of the dataset.
        ranks: of the job.
        gpu: mixed precision and SyncBatchNorm as on GPUs, else as on CPUs.

    Raises:
        UserError: what the training would refuse at its start, in the same words.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    watch = Watch()
    with dist.rehearsal(ranks), fake, watch:
        return _Rehearsal(blueprint, images, ranks, gpu, watch).run()


class _Rehearsal:
    def __init__(self, blueprint: Blueprint, images: int, ranks: int, gpu: bool, watch: Watch) -> None:
        self.blueprint, self.config, self.ranks, self.gpu, self.watch = blueprint, blueprint.config, ranks, gpu, watch
        world, more = World(size=ranks), blueprint.more
        layout = torch.channels_last if self.config.model.channels_last else torch.contiguous_format
        names = ("multicrop", "images_per_epoch")
        loader = make_loader(Unseen(images), self.config, world, **{name: more.get(name) for name in names})
        precision = Precision()
        if gpu and self.config.model.use_fp16:
            precision = Precision(torch.bfloat16 if self.config.model.amp_dtype == "bf16" else torch.float16)
        self.feed = Feed(loader, Augment(), world, layout, precision, BadImages(loader.source))
        self.last_step = self.config.optim.epochs * loader.batches_per_epoch - 1

    def run(self) -> Rehearsed:
        memory: dict[str, int] = {}
        net = self.blueprint.make_model(self.config)
        check_crop_sizes(net.backbone, self.config.data.size_crops)
        memory["parameters"], memory["buffers"] = (
            tensor_bytes(list(net.parameters())),
            tensor_bytes(list(net.buffers())),
        )
        exchanged = [p for p in net.parameters() if p.requires_grad]
        options = self.config.model
        if not self.gpu:
            synchronise(net, options.sync_bn, options.syncbn_process_group_size, self.feed.device)
        elif options.sync_bn == "apex":
            dist.subgroup(options.syncbn_process_group_size)  # which refuses what does not divide
        before = self.watch.live
        method = self.blueprint.make_method(net, self.config, self.feed)
        self._fill_queues(method, net)
        memory["queue, memory bank, labels"] = self.watch.live - before
        optimizer = self._optimizer(method, net)
        memory["optimiser"] = tensor_bytes(list(optimizer.state.values()))
        files = self._files(net, optimizer, method)
        crops = [self._crops() for _ in range(self.config.optim.accumulate)]
        memory["crops"] = tensor_bytes(crops[0])
        del crops[1:]
        memory["gradients"] = tensor_bytes([p for p in net.parameters() if p.requires_grad])
        if self.ranks > 1:  # in the buckets of DistributedDataParallel, which are never given back
            for p in exchanged:
                p.grad = torch.zeros_like(p)
        self.watch.messages.clear()
        self.watch.peak = self.watch.live
        with self._normalisations(net):
            self._step(method, crops[0])
        peak = self.watch.peak
        messages = [*self.watch.messages, *self._wrapper_messages(net, exchanged)]
        optimizer.step()
        return Rehearsed(method, self.feed, memory, max(peak, self.watch.peak), files, messages)

    def _crops(self) -> tuple[list[Tensor], Tensor]:
        loader = self.feed.loader
        crops = [torch.zeros(loader.batch_size, 3, *size) for size in loader.multicrop.sizes]
        crops = [crop.contiguous(memory_format=self.feed.layout) for crop in crops]
        return crops, torch.zeros(loader.batch_size, dtype=torch.int64)

    def _fill_queues(self, method: Any, net: nn.Module) -> None:
        """State of a run in which queues are in use."""
        assigner, queue = getattr(method, "assigner", None), getattr(method, "queue", None)
        if assigner is not None:
            assigner.begin_epoch(max(self.config.optim.epochs - 1, 0), method.prototypes.weight)
            if assigner.queue is not None:
                state = assigner.queue.state_dict()
                assigner.queue.load_state_dict({**state, "filled": [2**40] * len(state["filled"])})
        if queue is not None:
            queue.pushed = len(queue.rows_LD)

    def _optimizer(self, method: Any, net: nn.Module) -> torch.optim.Optimizer:
        """With the state that its first step makes."""
        o, groups = self.config.optim, self.blueprint.more.get("parameter_groups")
        parameters = groups(net, self.config) if groups else net.parameters()
        optimizer = build_optimizer(parameters, o.optimizer, o.base_lr, o.wd, momentum=o.momentum)
        method.optimizer = optimizer
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        method.before_step(self.last_step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    def _step(self, method: Any, batch: tuple[list[Tensor], Tensor]) -> None:
        """As the training loop does it."""
        number = self.config.optim.accumulate
        if number > 1:
            with self.feed.autocast():
                method.begin_step(iter([batch] * number))
        for _ in range(number):
            with self.feed.autocast():
                loss = method.loss(*batch)
            loss.backward()
            del loss
        method.before_step(self.last_step)

    @contextmanager
    def _normalisations(self, net: nn.Module) -> Iterator[None]:
        """Notes what SyncBatchNorm sends on GPUs, where it is torch's own: it cannot run here."""
        o, norms = self.config.model, [m for m in net.modules() if isinstance(m, _BatchNorm)]
        group = o.syncbn_process_group_size if o.sync_bn == "apex" else 0
        ranks = group if 0 < group < self.ranks else 0

        def passed(norm: Any, *_: Any) -> None:
            if norm.training:
                self.watch.messages.append(Message("batchnorm", "all-gather", 4 * (2 * norm.num_features + 1), ranks))
                if torch.is_grad_enabled():
                    self.watch.messages.append(Message("batchnorm", "all-reduce", 8 * norm.num_features, ranks))

        wanted = self.gpu and self.ranks > 1 and ranks != 1 and o.sync_bn in ("pytorch", "apex")
        handles = [norm.register_forward_hook(passed) for norm in norms] if wanted else []
        yield
        for handle in handles:
            handle.remove()

    def _shares(self, module: nn.Module) -> bool:
        """Whether the layer's statistics are those of all ranks; on GPUs it would be another layer by then."""
        o = self.config.model
        groups = o.sync_bn == "apex" and 0 < o.syncbn_process_group_size < self.ranks
        if not self.gpu:
            return shared_by_all(module)
        return isinstance(module, _BatchNorm) and o.sync_bn in ("pytorch", "apex") and not groups

    def _wrapper_messages(self, net: nn.Module, exchanged: list[nn.Parameter]) -> Iterator[Message]:
        """What DistributedDataParallel and the training loop send in each step."""
        if self.ranks == 1:
            return
        held, most = 0, FIRST_BUCKET
        shrunk = 2 if self.config.run.grad_compression == "bf16" else 1
        for p in reversed(exchanged):
            held += p.nbytes
            if held >= most:
                yield Message("gradients", "all-reduce", held // shrunk)
                held, most = 0, BUCKET
        if held:
            yield Message("gradients", "all-reduce", held // shrunk)
        buffers = [] if same_on_all_ranks(net, self._shares) else list(net.buffers())
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            nbytes = sum(buffer.nbytes for buffer in buffers if buffer.dtype == dtype)
            yield Message("buffers of the network", "broadcast", nbytes)
        yield Message("agreement to go on", "all-reduce", 8 * AGREED)

    def _files(self, net: Any, optimizer: torch.optim.Optimizer, method: Any) -> dict[str, int]:
        state = method.state_dict()
        sharded = state.pop("sharded", {})
        shared = {"state_dict": published_state_dict(bare(net)), "optimizer": optimizer.state_dict()}
        files = {"checkpoint.pth.tar": _file_bytes({**shared, "method_state": state})}
        return {**files, "checkpoint.step*.rank*.pth": _file_bytes(sharded)} if sharded else files


def _file_bytes(state: dict[str, Any]) -> int:
    """Size of a file that `torch.save` makes: its tensors, and everything else as it is with empty ones."""
    with torch.utils._python_dispatch._disable_current_modes():
        hollow = tree_map(lambda leaf: torch.empty(0, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf, state)
        file = io.BytesIO()
        torch.save(hollow, file)
    return tensor_bytes(state) + len(file.getvalue())
