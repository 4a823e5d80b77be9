"""The words about a run agree with its numbers."""

from __future__ import annotations

import math
from pathlib import Path

from clusterssl.report.records import RunRecord, read_run
from clusterssl.report.verdict import verdict
from tests.report.runs import write_run


def test_a_run_that_learns_is_fine(tmp_path: Path) -> None:
    remarks = verdict(read_run(write_run(tmp_path / "run")))
    assert {remark.kind for remark in remarks} == {"good"}
    assert "44% below ln K = 3.401" in remarks[0].text
    assert "24 of 30 prototypes" in remarks[1].text


def test_a_collapsed_run_is_named(tmp_path: Path) -> None:
    flags = {"epochs": 2, "epsilon": 0.05, "freeze_prototypes_niters": 313}
    facts = {"steps_per_epoch": 20}
    run = write_run(tmp_path / "run", curve=[math.log(30)] * 41, config=flags, facts=facts)
    remarks = verdict(read_run(run))
    assert [remark.kind for remark in remarks] == ["bad", "bad", "bad", "good"]
    assert remarks[0].text.endswith("Try a smaller --epsilon, another --base_lr.")
    longer = write_run(tmp_path / "longer", curve=[math.log(30)] * 41, config={**flags, "epochs": 20}, facts=facts)
    assert "a longer --freeze_prototypes_niters" in verdict(read_run(longer))[0].text


def test_one_lucky_step_at_the_end_is_not_learning(tmp_path: Path) -> None:
    curve = [*[math.log(30)] * 39, 1.0]
    assert verdict(read_run(write_run(tmp_path / "run", curve=curve)))[0].kind == "bad"


def falling(ranks: list[float], *, prototypes: int = 60, end: float = 0.8) -> list[tuple[str, str]]:
    """Remarks about a run whose loss ends at `end` ln K and whose effective rank takes this course."""
    level = math.log(prototypes)
    steps = [
        {"step": at, "loss": level * (1 + (end - 1) * at / len(ranks)), "ln_k": level, "rankme": rank}
        for at, rank in enumerate(ranks, 1)
    ]
    about = {"config": {"epsilon": 0.05}}
    return [tuple(remark) for remark in verdict(RunRecord(Path("r"), "r", about=about, steps=steps))]  # type: ignore[misc]


def test_too_large_a_learning_rate_is_named_by_the_directions_it_costs() -> None:
    """Courses of measured runs on the digits: 23.4 directions untrained; rates 0.3, 0.1 and 0.003."""
    kinds, texts = zip(*falling([23.4, 9.0, 3.1, *[3.8] * 20]), strict=True)
    assert kinds == ("good", "bad") and "from 23 directions at the first step to 4" in texts[1]
    assert texts[1].endswith("Try a lower --base_lr.")
    for course in ([23.4, 4.2, *[6.2] * 20], [23.4, 14.0, *[16.5] * 20]):
        assert [kind for kind, _ in falling(course)] == ["good", "good"]


def test_few_classes_need_few_directions() -> None:
    assert [kind for kind, _ in falling([31.0, *[7.0] * 20], prototypes=10)] == ["good", "good"]


def test_without_a_fall_of_the_loss_its_own_remark_has_the_remedy() -> None:
    (_, stuck), (kind, narrow) = falling([23.4, *[3.4] * 20], end=1.0)
    assert "--epsilon" in stuck and kind == "bad" and "--base_lr" not in narrow


def test_far_above_ln_k_is_divergence() -> None:
    kind, text = falling([23.4, *[9.0] * 20], end=2.4)[0]
    assert kind == "bad" and "it diverged" in text and "still at" not in text
    near = falling([23.4, *[9.0] * 20], end=1.2)[0][1]
    assert "above ln K" in near and "it has not learned" in near
    assert "still at ln K" in falling([23.4, *[9.0] * 20], end=1.0)[0][1]


def test_a_short_run_is_judged_by_its_end_and_an_early_one_not_at_all() -> None:
    steps = [{"step": at, "loss": loss, "ln_k": 4.0} for at, loss in ((10, 4.5), (20, 3.9), (30, 3.4))]
    about = {"config": {"epochs": 3, "warmup_epochs": 1}, "facts": {"steps_per_epoch": 10}}
    whole = verdict(RunRecord(Path("r"), "r", about=about, steps=steps))
    assert whole[0].kind == "good" and "fell to 3.400" in whole[0].text
    about["config"]["warmup_epochs"] = 2
    begun = verdict(RunRecord(Path("r"), "r", about=about, steps=steps[:1]))
    assert [remark.kind for remark in begun] == ["note", "note"] and "step 10 of 30" in begun[1].text


def one_cluster(counts: list[int], largest: float | None, epochs: int = 1) -> list[tuple[str, str]]:
    """Remarks about clusters after 20 steps whose loss has fallen, of 20 an epoch."""
    steps = [{"step": at, "loss": 3.0, "ln_k": math.log(60)} for at in (10, 20)]
    about = {"config": {"epochs": epochs, "warmup_epochs": 0}, "facts": {"steps_per_epoch": 20}}
    run = RunRecord(Path("r"), "r", about=about, steps=steps, epochs=[{"epoch_end": 0, "occupancy": counts}])
    return [tuple(remark) for remark in verdict(run, largest) if "cluster" in remark.text]  # type: ignore[misc]


def test_one_cluster_of_most_images_is_named() -> None:
    even = [5] * 60
    ((kind, text),) = one_cluster(even, 188 / 320)
    assert kind == "bad" and "One cluster holds 59% of the images" in text and "after 20 steps" in text
    ((kind, text),) = one_cluster([*even, 700], 0.1)
    assert kind == "bad" and "70% of the last epoch's crops" in text
    assert one_cluster([*even, 700], None)[0][0] == "bad"
    assert (
        one_cluster(even, 0.3) == one_cluster(even, None) == one_cluster([90, 60], 0.6) == one_cluster([], None) == []
    )
    ((kind, text),) = one_cluster(even, 0.9, epochs=100)
    assert kind == "note" and "this early" in text


def test_waiting_for_data_and_restarts_are_said() -> None:
    steps = [{"step": at, "loss": 1.0, "images_per_s": 10.0, "data_wait": 0.6} for at in range(9)]
    run = RunRecord(Path("r"), "r", steps=steps, launches=[{}, {}])
    texts = " ".join(remark.text for remark in verdict(run))
    assert "--workers" in texts and "60%" in texts and "started 2 times" in texts


def test_no_steps_and_no_finite_loss() -> None:
    assert "No training step" in verdict(RunRecord(Path("r"), "r"))[0].text
    nan = RunRecord(Path("r"), "r", steps=[{"step": 0, "loss": math.nan}])
    assert verdict(nan)[0].kind == "bad"
