from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clusterssl import monitor
from clusterssl.cluster.sinkhorn import sinkhorn
from clusterssl.monitor import Monitor, Observation
from tests.launch import Launched, metrics
from tests.ranks import run_ranks


def embeddings(n: int = 60, dim: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(0)))


def test_rankme_equals_its_formula() -> None:
    z = embeddings().numpy().astype(np.float64)
    singular = np.linalg.svd(z, compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert monitor.rankme(embeddings()) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert monitor.rankme(F.normalize(torch.ones(20, 5))) == pytest.approx(1, abs=1e-4)
    assert monitor.rankme(torch.eye(6)) == pytest.approx(6, abs=1e-4)


def test_feature_std_and_entropy_equal_their_formulas() -> None:
    z = embeddings()
    expected = z.double().numpy().std(0).mean() * math.sqrt(8)
    assert monitor.feature_std(z) == pytest.approx(expected, rel=1e-9)
    q = torch.softmax(torch.randn(30, 7, generator=torch.Generator().manual_seed(0)), 1)
    assert monitor.entropy(q) == pytest.approx(float(-(q * q.log()).sum(1).mean()), rel=1e-6)
    assert monitor.entropy(torch.eye(5)) == 0


def test_perplexity() -> None:
    assert monitor.perplexity(torch.tensor([5, 5, 5, 0])) == pytest.approx(3)
    assert monitor.perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1)


def measured(rank: int, world_size: int) -> dict[str, float]:
    z = embeddings().chunk(world_size)[rank]
    scores = z @ embeddings(10).T
    seen = Observation(z, scores, torch.softmax(scores, 1))
    watch = Monitor()
    watch.observe(seen)
    return watch.measure(1.0, seen)


def test_many_ranks_measure_what_one_does() -> None:
    alone = measured(0, 1)
    for answer in run_ranks(measured, 2):
        assert answer == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("loss", [math.log(10), 5.0])
def test_a_collapse_of_heads_of_different_size_is_seen_at_their_mean_ln_k(loss: float) -> None:
    watch = Monitor(patience=1, least_steps=0)
    seen = Observation(embeddings(), torch.randn(60, 10), torch.full((60, 10), 0.1), ln_k=5.0)
    watch.observe(seen)
    assert watch.measure(loss, seen)["ln_k"] == 5
    assert bool(watch.verdict) == (loss == 5)
    said = "5.000, the mean over the heads, in one head assignments are nearly uniform (entropy 2.30 of ln K = 2.30)"
    assert loss != 5 or f"loss 5.000 at ln K = {said}" in watch.verdict


def test_occupancy_counts_each_epoch_anew() -> None:
    watch, z = Monitor(), torch.eye(3)
    seen = Observation(z, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0]]), torch.eye(3))
    watch.observe(seen)
    watch.observe(seen)
    assert watch.epoch_occupancy() == [2, 4, 0] and watch.epoch_occupancy() == [0, 0, 0]
    numbers = watch.measure(1.0, seen)
    assert numbers["dead_share"] == pytest.approx(1 / 3), "the window of logged steps is not the epoch's"


def judged(loss: float, z: torch.Tensor, epsilon: float, times: int = 3, every: int = 10) -> str:
    watch = Monitor("try --epsilon")
    scores = z @ F.normalize(embeddings(20)).T
    seen = Observation(z, scores, sinkhorn(scores, epsilon, 3))
    for _ in range(times):
        for _ in range(every):
            watch.observe(seen)
        watch.measure(loss, seen)
    return watch.verdict


def test_occupancy_follows_a_number_of_clusters_that_changes_between_epochs() -> None:
    monitor, z = Monitor(), torch.eye(8)
    for number in (5, 7, 3):
        monitor.observe(Observation(z, torch.eye(8)[:, :number], None))
        assert monitor.epoch_occupancy() == [8 - number + 1, *[1] * (number - 1)]
        resumed = Monitor()
        resumed.load_state_dict(monitor.state_dict())
        resumed.observe(Observation(z, torch.eye(8)[:, : number + 1], None))
        assert resumed.epoch_occupancy() == [8 - number, *[1] * number]


def test_verdict_needs_evidence_loss_at_ln_k_and_patience() -> None:
    one_direction = F.normalize(embeddings() * 0.01 + torch.ones(8))
    assert "nearly equal" in judged(math.log(20), one_direction, 0.05)
    assert judged(math.log(20), one_direction, 0.05, times=2) == ""
    assert judged(math.log(20) * 0.9, one_direction, 0.05) == ""
    assert judged(math.log(20), one_direction, 0.05, times=20, every=1) == "", "20 steps from the first suspicion on"
    assert judged(math.log(20), one_direction, 0.05, times=21, every=1) != ""
    assert judged(math.log(20), embeddings(), 0.05) == ""
    assert judged(math.log(20), one_direction, 0.05).endswith("try --epsilon")


def test_a_resumed_monitor_goes_on_where_the_saved_one_was() -> None:
    z = embeddings()
    scores = z @ F.normalize(embeddings(20)).T
    seen = Observation(z, scores, sinkhorn(scores, 0.05, 3))
    whole, first, second = Monitor(), Monitor(), Monitor()
    for watch in (whole, first):
        watch.observe(seen)
        watch.measure(math.log(20), seen)
    second.load_state_dict(first.state_dict())
    for watch in (whole, second):
        watch.observe(seen)
    assert second.epoch_occupancy() == whole.epoch_occupancy() and sum(second.epoch_occupancy()) == 0
    assert second.state_dict()["untrained"] == whole.state_dict()["untrained"]


def test_assignments_that_get_sharper_again_are_no_collapse() -> None:
    watch = Monitor()
    for number in range(8):
        watch._judge(math.log(20), {"ln_k": math.log(20), "entropy": math.log(20) * (0.999 - 0.011 * number),
                                    "feature_std": 0.5, "rankme": 5.0}, math.log(20))  # fmt: skip
    assert watch.verdict == ""


def test_a_loss_that_passes_ln_k_on_its_way_down_is_no_collapse(tmp_path: Path) -> None:
    """Self-Classifier begins above ln K, and its embeddings narrow while it passes; every step is logged."""
    flags = ["--epochs", "3", "--log_freq", "1", "--seed", "32", "--dump_path", str(tmp_path)]
    codes, printed = Launched("main_selfclassifier.py", *flags).wait()
    assert codes == [0] and "collapse" not in printed, printed
    at_ln_k = [record for record in metrics(tmp_path) if abs(record.get("loss", 0) / record.get("ln_k", 1) - 1) < 0.02]
    assert len(at_ln_k) > 3 and metrics(tmp_path)[-1]["epoch_end"] == 2


COLLAPSING = [
    *("--data_path", "digits", "--size_crops", "32", "--arch", "conv4w8", "--workers", "0", "--nmb_prototypes", "100"),
    *("--hidden_mlp", "64", "--feat_dim", "32", "--base_lr", "4.8", "--batch_size", "64", "--warmup_epochs", "0"),
    *("--freeze_prototypes_niters", "0", "--epochs", "7", "--device", "cpu"),
]
"""the published optimiser and augmentation on small images"""


def test_a_collapsing_run_is_named_within_100_steps_and_stopped(tmp_path: Path) -> None:
    flags = [*COLLAPSING, "--stop_on_collapse", "true", "--dump_path", str(tmp_path)]
    codes, printed = Launched("main_swav.py", *flags, ranks=2).wait()
    assert codes == [2, 2] and "collapse: loss" in printed and "--epsilon" in printed
    warned = [line for line in printed.splitlines() if "collapse: loss" in line and "--stop_on_collapse" not in line]
    assert len(warned) == 1, "by one rank"
    assert max(record.get("step", 0) for record in metrics(tmp_path)) <= 100


def test_a_learning_run_is_never_named(tmp_path: Path) -> None:
    codes, printed = Launched("main_swav.py", "--epochs", "10", "--dump_path", str(tmp_path)).wait()
    assert codes == [0] and "collapse" not in printed
    records = [record for record in metrics(tmp_path) if "step" in record]
    assert records[-1]["loss"] < 0.75 * records[-1]["ln_k"] and records[-1]["dead_share"] < 0.2
