from __future__ import annotations

import numpy as np
import pytest
import torch

from clusterssl.optim import LARS, build_optimizer, warmup_cosine
from tests.golden_files import Golden

LARC = Golden("larc_sgd")
SCHEDULES = Golden("lr_schedules")


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
