"""Between two log points no method waits for the device: seen by a device that has no memory, and by a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterssl.data import Batch, Loader, blur
from clusterssl.dist import World
from clusterssl.engine import _Training
from clusterssl.plan.blueprint import read_script
from clusterssl.preemption import StopRequest
from clusterssl.pretrain import assemble
from tests.launch import ROOT
from tests.test_methods import METHODS, SHARED

ELSEWHERE = "lazy"
"""a device that is not the CPU, of which torch's FakeTensorMode knows no more than its name, and autograd neither"""
WHERE_READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
VARIANTS = {
    **{name: (script, flags) for name, (script, flags, _) in METHODS.items()},
    "swav_queue": (
        "main_swav.py",
        [*METHODS["swav"][1], "--queue_length", "32", "--epoch_queue_starts", "0", "--hard_assignment", "true"],
    ),
    "swav_accumulate": ("main_swav.py", [*METHODS["swav"][1], "--accumulate", "2", "--batch_size", "8"]),
    "swav_lars": ("main_swav.py", [*METHODS["swav"][1], "--optimizer", "lars", "--wd", "1e-4", "--clip_grad", "1"]),
    "selfclassifier_accumulate": (
        "main_selfclassifier.py", [*METHODS["selfclassifier"][1], "--accumulate", "2", "--batch_size", "8"],
    ),
}  # fmt: skip


class WaitedError(Exception):
    """The host would stand still until the device has come so far."""


class NeverWaits(TorchDispatchMode):
    """Raises where a number or a shape is read off the device, and where a copy from or to it is waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._opname, kwargs or {}
        before = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if ELSEWHERE in before and (name in WHERE_READ or (name == "index" and masks)):
            raise WaitedError(name)
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            there, here = out.device.type, source.device.type
            waits = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False) is False
            if there != here and (waits or there == "cpu"):
                raise WaitedError(f"{name} from {here} to {there}")
        return out


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, tensors have no memory, and waiting for those of `ELSEWHERE` raises."""
    with FakeTensorMode(allow_non_fake_inputs=True), NeverWaits():
        yield


def without_memory(net: Any) -> Any:
    """A network whose tensors are elsewhere, and stay there."""
    with torch.no_grad():
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                there = torch.empty_like(p, device=ELSEWHERE)
                setattr(module, name, nn.Parameter(there, p.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=ELSEWHERE))
    net.to = lambda *_, **__: net
    return net


def prepared(name: str, folder: Path, device: torch.device) -> _Training:
    """A training whose queues are in use from the second step on."""
    script, flags = VARIANTS[name]
    plan = read_script(ROOT / script, [*SHARED, *flags, "--dump_path", str(folder), "--epochs", "4"], 1, 1)

    def make_model(config: Any) -> Any:
        if device.type != ELSEWHERE:
            return plan.make_model(config)
        with unset_fake_temporarily():
            net = plan.make_model(config)
        return without_memory(net)

    parts = assemble(plan.name, plan.config, World(device=device), make_model, plan.make_method, **plan.more)
    parts.model.train()
    return _Training(parts, StopRequest())


def step(training: _Training, batches: list[Batch]) -> None:
    """What `fit` does between two log points."""
    training.learn(batches)
    training.save_or_stop()
    training.profile.step()


@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_waits_for_a_device_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the device
    for name_of, function in list(vars(blur).items()):  # what they keep would be of another test's device
        if hasattr(function, "cache_clear"):
            monkeypatch.setattr(blur, name_of, function.__wrapped__)
    loaded = given(name, tmp_path / "loader")
    with FakeTensorMode(allow_non_fake_inputs=True):
        training = prepared(name, tmp_path / "run", torch.device(ELSEWHERE))
        method = training.parts.method
        if hasattr(method, "assigner"):
            method.assigner.begin_epoch(0, method.prototypes.weight)
        with NeverWaits():
            for batches in loaded:
                step(training, batches)
    assert training.step == len(loaded) == 3 and training.loss.device.type == ELSEWHERE
    assert next(training.parts.model.parameters()).device.type == ELSEWHERE


class Drawn(NamedTuple):
    """Parameters of an augmentation as an array, where tensors would give none."""

    array: Any

    def numpy(self) -> Any:
        return self.array


def given(name: str, folder: Path) -> list[list[Batch]]:
    """The batches of the first epoch, in real memory."""
    steps = prepared(name, folder, torch.device("cpu")).feed.loader.epoch(0)
    return [[batch._replace(params=Drawn(batch.params.numpy())) for batch in step] for step in steps]


def _mask(x: Tensor) -> Tensor:
    return x[x > 0]


def _branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "branch": _branch,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": _mask,
    "equal": lambda x: torch.equal(x, x),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device) * x,
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "blocking copy": lambda x: torch.ones(2).to(x.device),
    "later": lambda x: torch.zeros(2).copy_(x, non_blocking=True),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_guard_sees_who_waits(name: str) -> None:
    with guarded():
        x = torch.zeros(2, device=ELSEWHERE)
        with pytest.raises(WaitedError):
            WAITING[name](x)


def test_the_guard_lets_pass_who_does_not_wait() -> None:
    with guarded():
        x = torch.zeros(2, device=ELSEWHERE)
        y = torch.ones(2).to(x.device, non_blocking=True)
        z = torch.where(x > 0, 3.0, y).masked_fill_(x > 0, 0.0) + 1
        assert (z @ y).device.type == ELSEWHERE and float(torch.tensor([2.0])[0]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_waits_for_a_gpu(name: str, tmp_path: Path) -> None:
    training = prepared(name, tmp_path, torch.device("cuda", 0))
    loader: Loader = training.feed.loader
    for epoch in range(2):
        training.parts.method.begin_epoch(epoch)
        training.parts.model.train()
        for batches in loader.epoch(epoch, 0, training.parts.method.order(epoch)):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if epoch else "default")
            try:
                step(training, batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert training.step == 6
