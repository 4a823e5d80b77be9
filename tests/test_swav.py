from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main_swav
from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.cluster.online import AssignmentOptions
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.models.build import build_model
from clusterssl.options import DataOptions, OptimOptions
from tests.feeds import GivenFeed
from tests.golden_files import Golden
from tests.ranks import run_ranks

GOLDEN = Golden("swav_loss_step")


class EmbeddingsGiven(nn.Module):
    """Stands where the network stands and passes the embeddings that it is given; prototypes are real."""

    def __init__(self, weight_KD: Tensor) -> None:
        super().__init__()
        self.prototypes = nn.Linear(weight_KD.shape[1], weight_KD.shape[0], bias=False)
        self.prototypes.weight.data = weight_KD.clone()

    def prototype_layers(self) -> list[nn.Linear]:
        return [self.prototypes]

    def normalize_prototypes(self) -> None:
        self.prototypes.weight.data = F.normalize(self.prototypes.weight.data, dim=1)

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        return crops[0], self.prototypes(crops[0])


def config_of(given: dict, queue_length: int) -> main_swav.Config:
    views = given["nmb_crops"]
    many = {name: (value,) * len(views) for name, value in (("min_scale_crops", 0.5), ("max_scale_crops", 1.0))}
    config = main_swav.Config(DataOptions(nmb_crops=tuple(views), size_crops=((8, 8),) * len(views), **many))
    swav = main_swav.SwAVOptions(
        tuple(given["crops_for_assign"]), given["temperature"],
        freeze_prototypes_niters=given["freeze_prototypes_niters"],
    )  # fmt: skip
    assignment = AssignmentOptions(
        given["epsilon"], given["sinkhorn_iterations"], queue_length=queue_length, epoch_queue_starts=0
    )
    return replace(config, swav=swav, assignment=assignment, optim=OptimOptions(batch_size=given["batch"]))


def follow(rank: int, world_size: int, case: str) -> dict[str, float]:
    """Largest differences between a golden case and `SwAV` over its iterations, on one rank."""
    end = f"_r{rank}" if world_size > 1 else ""
    given = GOLDEN.params(case)
    queue_key = f"{case}_queue_before{end}"
    before = torch.from_numpy(GOLDEN[queue_key]) if queue_key in GOLDEN else None
    net = EmbeddingsGiven(torch.from_numpy(GOLDEN[f"{case}_W"]))
    length = 0 if before is None else before.shape[1] * world_size
    method = main_swav.SwAV(net, config_of(given, length), GivenFeed(step_images=given["batch"]))
    method.begin_epoch(given["epoch"])
    if before is not None:
        rows = before.unflatten(1, (-1, given["batch"])).permute(2, 0, 1, 3)
        filled = [int((rows[:, slot] != 0).any(2).any(0).sum()) for slot in range(rows.shape[1])]
        method.load_state_dict({"sharded": {"queue": rows}, "filled": filled})
    worst = dict.fromkeys(("loss", "q", "grad_z", "grad_w", "w_normalised", "queue_after"), 0.0)

    def compare(name: str, ours: Tensor, step: int) -> None:
        expected = torch.as_tensor(GOLDEN[f"{case}_{name}{end}"][step])
        assert torch.isfinite(ours).all(), name
        worst[name] = max(worst[name], float((ours.detach() - expected).abs().max()))

    for step in range(given["iterations"]):
        z = torch.from_numpy(GOLDEN[f"{case}_z{end}"][step]).requires_grad_()
        net.prototypes.weight.grad = None
        loss = method.loss([z], torch.zeros(given["batch"], dtype=torch.int64))
        loss.backward()
        method.before_step(given["epoch"] * given["iterations"] + step)
        absent = net.prototypes.weight.grad is None
        assert absent == bool(GOLDEN[f"{case}_grad_w_is_none{end}"][step])
        compare("loss", loss, step)
        assert method.seen is not None and z.grad is not None
        compare("q", method.seen.assignments_NK.view(GOLDEN[f"{case}_q{end}"][step].shape), step)
        compare("grad_z", z.grad, step)
        if not absent:
            compare("grad_w", net.prototypes.weight.grad, step)
        compare("w_normalised", net.prototypes.weight, step)
        if before is not None and method.assigner.queue is not None:
            rows = torch.stack([method.assigner.queue.rows(slot) for slot in range(before.shape[0])])
            compare("queue_after", rows, step)
    return worst


CASES = [key[: -len("_params")] for key in GOLDEN.names() if key.endswith("_params")]


@pytest.mark.parametrize("case", [case for case in CASES if "two_ranks" not in case])
def test_follows_the_golden_steps(case: str) -> None:
    assert max(follow(0, 1, case).values()) < 2e-5


@pytest.mark.parametrize("case", [case for case in CASES if "two_ranks" in case])
def test_follows_the_golden_steps_of_two_processes(case: str) -> None:
    for worst in run_ranks(follow, 2, case):
        assert max(worst.values()) < 2e-5


def test_every_golden_case_is_followed() -> None:
    assert len(CASES) == 8


def naive_loss(z_ND: Tensor, weight_KD: Tensor, q_ABK: Tensor, assigned: list[int], tau: float) -> Tensor:
    """Equation 6 as a double loop."""
    views_VBD = z_ND.unflatten(0, (-1, q_ABK.shape[1]))
    total = z_ND.new_zeros(())
    for q_BK, a in zip(q_ABK, assigned, strict=True):
        for v in range(len(views_VBD)):
            if v != a:
                p_BK = torch.softmax(views_VBD[v] @ weight_KD.T / tau, dim=1)
                total = total - (q_BK * p_BK.log()).sum(1).mean() / (len(views_VBD) - 1)
    return total / len(assigned)


def test_swapped_prediction_equals_the_double_loop() -> None:
    torch.manual_seed(0)
    z, weight = F.normalize(torch.randn(5 * 6, 8).double()), F.normalize(torch.randn(11, 8).double())
    q = torch.rand(3, 6, 11).double()
    ours = main_swav.swapped_prediction(z @ weight.T, q, [0, 3, 4], 0.1)
    torch.testing.assert_close(ours, naive_loss(z, weight, q, [0, 3, 4], 0.1))


def small_config(batch_size: int, accumulate: int = 1, queue_length: int = 0) -> main_swav.Config:
    base = main_swav.DIGITS
    assignment = AssignmentOptions(queue_length=queue_length, epoch_queue_starts=0)
    swav = replace(base.swav, nmb_prototypes=12)
    return replace(
        base, swav=swav, assignment=assignment, optim=replace(base.optim, batch_size=batch_size, accumulate=accumulate)
    )


def train(rank: int, world_size: int, batch_norm: bool, accumulate: int = 1, steps: int = 3) -> tuple[list, dict]:
    """Losses and weights of some SwAV steps on 24 images in float64, however they are split."""
    torch.manual_seed(0)
    net = build_model("conv4w4", "small", 16, 8, 12, head_bn=batch_norm).double()
    if not batch_norm:
        net.backbone.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else m)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(steps, 2, 24, 3, 16, 16, generator=generator).double()
    net = synchronise(net, "pytorch", 0, torch.device("cpu"))
    if not batch_norm:
        net.train = lambda mode=True: net  # type: ignore[method-assign]
    model = distribute(net, World(rank, world_size))
    per_rank = 24 // world_size
    config = small_config(per_rank // accumulate, accumulate, 24)
    method = main_swav.SwAV(model, config, GivenFeed(step_images=per_rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method.begin_epoch(0)
    losses = []
    for step in range(steps):
        crops = [view.chunk(world_size)[rank] for view in images[step]]
        micro = [[view.chunk(accumulate)[m] for view in crops] for m in range(accumulate)]
        if accumulate > 1:
            method.begin_step((batch, torch.zeros(len(batch[0]), dtype=torch.int64)) for batch in micro)
        step_loss = 0.0
        optimizer.zero_grad()
        for batch in micro:
            loss = method.loss(batch, torch.zeros(len(batch[0]), dtype=torch.int64)) / accumulate
            loss.backward()
            step_loss += loss.item()
        optimizer.step()
        losses.append(step_loss)
    return losses, {name.removeprefix("module."): value.detach() for name, value in model.state_dict().items()}


def assert_same_training(parts: list[tuple[list, dict]], alone: tuple[list, dict]) -> None:
    for step, expected in enumerate(alone[0]):
        assert abs(sum(part[0][step] for part in parts) / len(parts) - expected) < 1e-9
    for name, expected in alone[1].items():
        for _, weights in parts:
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-9, msg=f"{name} differs")


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_on_many_ranks_equals_one_in_float64(world_size: int) -> None:
    """Network with synchronised BatchNorm, multi-crop loss, Sinkhorn, queue, gradient averaging and optimiser."""
    assert_same_training(run_ranks(train, world_size, True), train(0, 1, True))


def test_accumulation_equals_one_large_batch() -> None:
    """Without BatchNorm, which sees micro-batches by its nature."""
    assert_same_training([train(0, 1, False, accumulate=3)], train(0, 1, False))


def test_refuses_crops_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="--crops_for_assign 0 2: there are 2 crops, use numbers 0 to 1"):
        replace(main_swav.Config(), swav=main_swav.SwAVOptions(crops_for_assign=(0, 2)))
