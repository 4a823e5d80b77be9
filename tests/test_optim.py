from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clusterssl import optim
from clusterssl.models.selfclassifier import WeightNormLinear
from clusterssl.optim import LARS, build_optimizer, decay_groups, warmup_cosine
from clusterssl.options import OptimOptions
from tests.golden_files import Golden

LARC = Golden("larc_sgd")
SCHEDULES = Golden("lr_schedules")


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "as on a GPU":
        monkeypatch.setattr(optim, "_in_turn", optim._together)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", ["basic", "big_wd", "float32", "groups"])
def test_lars_follows_the_golden_trajectory(case: str) -> None:
    given = LARC.params(case)
    params = [torch.nn.Parameter(torch.from_numpy(LARC[f"{case}_p{i}_start"])) for i in range(len(given["shapes"]))]
    groups = [
        {"params": [params[i] for i in group["idx"]], "weight_decay": group.get("wd", given["wd"])}
        for group in given.get("groups", [{"idx": range(len(params))}])
    ]
    optimizer = LARS(groups, lr=given["lr"])
    tolerance = 1e-5 if given.get("dtype") == "f4" else 1e-12
    for step in range(given["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = float(LARC[f"{case}_lr"][step])
        for i, p in enumerate(params):
            absent = LARC[f"{case}_grad_is_none"][step, i]
            p.grad = None if absent else torch.from_numpy(LARC[f"{case}_p{i}_grads"][step])
        optimizer.step()
        for i, p in enumerate(params):
            np.testing.assert_allclose(p.detach().numpy(), LARC[f"{case}_p{i}_traj"][step], rtol=0, atol=tolerance)


def test_lars_trains_the_golden_model() -> None:
    given = LARC.params("model")
    x, y = torch.from_numpy(LARC["model_X"]), torch.from_numpy(LARC["model_Y"])
    layers = [torch.nn.Linear(given["in"], given["hid"]), torch.nn.ReLU(), torch.nn.Linear(given["hid"], given["out"])]
    model = torch.nn.Sequential(*layers).to(x.dtype)
    model.load_state_dict({name: torch.from_numpy(LARC[f"model_start_{name}"]) for name in model.state_dict()})
    optimizer = LARS(model.parameters(), lr=given["lr"], weight_decay=given["wd"])
    for step in range(given["steps"]):
        loss = (model(x) - y).square().mean()
        np.testing.assert_allclose(loss.item(), LARC["model_loss"][step], rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            expected = LARC[f"model_traj_{name}"][step]
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_lars_equals_timm() -> None:
    timm_optim = pytest.importorskip("timm.optim")
    torch.manual_seed(0)
    ours = torch.nn.Linear(20, 30).double()
    theirs = torch.nn.Linear(20, 30).double()
    theirs.load_state_dict(ours.state_dict())
    a = LARS(ours.parameters(), lr=0.3, weight_decay=1e-4)
    b = timm_optim.Lars(
        theirs.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4, trust_coeff=0.001, always_adapt=True
    )
    x, y = torch.randn(64, 20).double(), torch.randn(64, 30).double()
    for _ in range(100):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-8)


SWAV_CASES = [key[: -len("_params")] for key in SCHEDULES.names() if key.startswith("swav_") and "_params" in key]


@pytest.mark.parametrize("case", SWAV_CASES)
def test_schedule_equals_the_published_one(case: str) -> None:
    given = SCHEDULES.params(case)
    for step, expected in zip(SCHEDULES[f"{case}_index"], SCHEDULES[f"{case}_lr"], strict=True):
        ours = warmup_cosine(
            int(step), steps_per_epoch=given["n"], epochs=given["epochs"], warmup_epochs=given["warmup_epochs"],
            start=given["start_warmup"], base=given["base_lr"], final=given["final_lr"],
        )  # fmt: skip
        assert abs(ours - expected) < 1e-10


def test_optimizers_by_name() -> None:
    weight = [torch.nn.Parameter(torch.ones(2))]
    assert isinstance(build_optimizer(weight, "lars", 1.0, 0.0), LARS)
    assert isinstance(build_optimizer(weight, "sgd", 1.0, 0.0), torch.optim.SGD)
    assert isinstance(build_optimizer(weight, "adamw", 1.0, 0.0), torch.optim.AdamW)
    with pytest.raises(ValueError, match="unknown optimiser"):
        build_optimizer(weight, "adam", 1.0, 0.0)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_momentum_of_all_groups_but_those_with_their_own(name: str) -> None:
    """From zero, where LARS leaves gradients as they are, a second gradient of 1 moves by 1 + m."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "momentum": 0.0}]
    optimizer = build_optimizer(groups, name, 0.5, 0.0, momentum=0.6)
    for expected in ([-0.5, -0.5], [-0.8, -0.5]):
        for p in params:
            p.data.zero_()
            p.grad = torch.ones(3)
        optimizer.step()
        assert [float(p.detach()[0]) for p in params] == pytest.approx(expected)


PARAM_GROUPS = json.loads(str(Golden("eval_metrics")["sc_param_groups"]))


@pytest.mark.parametrize("case", PARAM_GROUPS, ids=lambda case: f"{case['no_bias_wd']}-{case['bbone_wd']}")
def test_parameter_groups_equal_the_published_ones(case: dict) -> None:
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model.mlp_head, model.cls_0 = torch.nn.Linear(4, 3), WeightNormLinear(3, 5)
    groups = decay_groups(model, no_bias_wd=case["no_bias_wd"], bbone_wd=case["bbone_wd"])
    names = {id(p): name for name, p in model.named_parameters()}
    expected = case["groups"] or [{"params": list(names.values())}]
    assert len(expected) == len(groups)
    for ours, published in zip(groups, expected, strict=True):
        assert [names[id(p)] for p in ours["params"]] == published["params"]
        assert ours.get("weight_decay") == published.get("weight_decay")
    model.cls_0.weight_g.requires_grad_(False)
    frozen = decay_groups(model, no_bias_wd=case["no_bias_wd"], bbone_wd=case["bbone_wd"])
    assert sum(len(group["params"]) for group in frozen) == len(names) - 1


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_each_gradient_is_clipped_by_itself(name: str) -> None:
    shapes = [(3, 4), (7,), (2, 2)]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = build_optimizer(params, name, 0.1, 1e-4, clip_grad=0.5)
    plain = build_optimizer(twins, name, 0.1, 1e-4)
    for _ in range(3):
        for p, twin, size in zip(params[:2], twins, (10.0, 0.01), strict=False):  # the third has no gradient
            p.grad = size * torch.randn_like(p)
            twin.grad = p.grad.clone()
            torch.nn.utils.clip_grad_norm_([twin], 0.5)
        ours.step()
        plain.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin)


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 10), (9, 10), (10, 10), (11, 10), (30, 10), (1, 1), (5, 0), (25, 25), (2, 3), (3, 3)]
)
def test_no_run_ends_at_its_highest_rate(epochs: int, warmup: int) -> None:
    usable = OptimOptions(epochs=epochs, warmup_epochs=warmup).usable_warmup
    rates = [
        warmup_cosine(step, steps_per_epoch=20, epochs=epochs, warmup_epochs=usable, start=0.0, base=1.0, final=0.0)
        for step in range(20 * epochs)
    ]
    assert max(rates) == 1.0 and rates[-1] < 0.01
    asked = 20 * warmup if warmup < epochs else 2 * epochs
    assert rates.index(1.0) == max(asked - 1, 0), "the last step of the warm-up, or the first of all without one"
    assert all(rate < 1 for rate in rates[: max(asked - 1, 0)])
