"""What every method must do, whatever it computes: train, predict clusters, start from weights, be evaluated."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path

import pytest
import torch

from clusterssl import checkpoint, config, hub
from clusterssl.data import Loader
from clusterssl.errors import UserError
from clusterssl.files import read_checkpoint
from clusterssl.models.weights import model_from_weights
from clusterssl.plan.blueprint import read_script
from clusterssl.plan.rehearsal import rehearse
from clusterssl.report.records import RunRecord
from clusterssl.report.verdict import verdict
from tests.launch import ROOT, Launched, metrics

SHARED = [
    *("--data_path", "synthetic:48:24x24", "--arch", "conv4w4", "--epochs", "2", "--batch_size", "16"),
    *("--workers", "0", "--log_freq", "1", "--device", "cpu", "--seed", "5"),
]
VIEWS = ["--nmb_crops", "2", "--size_crops", "16", "--min_scale_crops", "0.4", "--max_scale_crops", "1"]
HEAD = ["--hidden_mlp", "16", "--feat_dim", "8", "--warmup_epochs", "0", "--base_lr", "0.1"]
METHODS = {
    "swav": ("main_swav.py", [*VIEWS, *HEAD, "--nmb_prototypes", "6"], [6]),
    "deepclusterv2": ("main_deepclusterv2.py", [*VIEWS, *HEAD, "--nmb_prototypes", "6", "5"], [6, 5]),
    "sela": ("main_sela.py", [*VIEWS, *HEAD, "--nmb_prototypes", "6", "5"], [6, 5]),
    "sela_v1": ("main_sela.py", ["--version", "1", "--size_crops", "16", "--hc", "2", "--ncl", "6"], [6, 6]),
    "deepcluster": ("main_deepcluster.py", ["--size_crops", "16", "--nmb_cluster", "6"], [6]),
    "selfclassifier": ("main_selfclassifier.py", [*VIEWS, *HEAD, "--cls_size", "6", "5", "--queue_len", "32"], [6, 5]),
}
TRACES = ROOT / "tests" / "golden" / "traces.json"
ALL = pytest.mark.parametrize("name", METHODS)


def trained(name: str, folder: Path, *more: str) -> Path:
    """Checkpoint of a run of some seconds."""
    script, flags, _ = METHODS[name]
    codes, printed = Launched(script, *SHARED, *flags, "--dump_path", str(folder), *more).wait()
    assert codes == [0], printed
    return folder / "checkpoint.pth.tar"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the tests that need them, each method trained once."""
    return {"folder": tmp_path_factory.mktemp("methods")}


def of(name: str, checkpoints: dict[str, Path]) -> Path:
    if name not in checkpoints:
        checkpoints[name] = trained(name, checkpoints["folder"] / name)
    return checkpoints[name]


@ALL
def test_predicts_clusters_from_its_checkpoint(name: str, checkpoints: dict[str, Path]) -> None:
    path = of(name, checkpoints)
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 4 - 2
    model = model_from_weights(str(path)).eval()
    for head, clusters in enumerate(METHODS[name][2]):
        ids = model.predict(images, head=head)
        assert ids.shape == (40,) and ids.dtype == torch.int64
        assert int(ids.min()) >= 0 and int(ids.max()) < clusters
        loaded = hub.network(weights=path).train()
        assert torch.equal(ids, loaded.predict(images, head=head)), "in evaluation mode, whatever mode it is in"
        assert loaded.training and torch.equal(ids, loaded.predict(images, head=head)), "nor does BatchNorm move"
    for wrong in (images.to(torch.uint8), images[0], images[:, :1], images.tolist()):
        with pytest.raises(UserError, match="one floating point tensor B x 3 x height x width"):
            model.predict(wrong)
    with torch.no_grad():
        assert hub.backbone(path).eval()(images).shape == (40, 32)


@ALL
def test_starts_from_its_own_weights(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = of(name, checkpoints)
    still = ["--base_lr", "0", "--final_lr", "0", "--start_warmup", "0", "--epochs", "1", "--wd", "0"]
    started = read_checkpoint(trained(name, tmp_path / "again", "--init", str(path), *still))["state_dict"]
    before = read_checkpoint(path)["state_dict"]
    trunk = [key for key in before if key.split(".")[-2].startswith("conv") and key.endswith("weight")]
    assert len(trunk) == 4 and all(torch.equal(started[key], before[key]) for key in trunk)


@ALL
def test_losses_of_the_first_steps_are_those_recorded(name: str, tmp_path: Path) -> None:
    """A guard against changes that nobody meant; RECORD_TRACES=1 records anew."""
    records = metrics(trained(name, tmp_path, "--epochs", "7").parent)
    losses = [record["loss"] for record in records if "step" in record][:20]
    known = json.loads(TRACES.read_text()) if TRACES.exists() else {}
    if os.environ.get("RECORD_TRACES"):
        TRACES.write_text(json.dumps({**known, name: losses}, indent=1) + "\n")
    assert losses == pytest.approx(known[name], rel=1e-3), "differs from tests/golden/traces.json"


@ALL
def test_the_monitor_sees_it(name: str, checkpoints: dict[str, Path]) -> None:
    records = [record for record in metrics(of(name, checkpoints).parent) if "step" in record]
    assert [record["step"] for record in records] == list(range(1, 7))
    for record in records:
        assert {"loss", "ln_k", "perplexity", "feature_std", "rankme"} <= set(record)
    assert all(record["loss"] > 0 for record in records)


@ALL
def test_refuses_the_run_directory_of_another(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = "deepcluster" if name == "swav" else "swav"
    script, flags, _ = METHODS[name]
    folder = of(other, checkpoints).parent
    codes, printed = Launched(script, *SHARED, *flags, "--dump_path", str(folder)).wait()
    assert codes == [2] and "holds a run of" in printed and len(printed.strip().splitlines()) <= 2, printed


@ALL
def test_refuses_to_go_on_with_other_images(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    script, flags, _ = METHODS[name]
    folder = of(name, checkpoints).parent
    words = [*SHARED, *flags, "--data_path", "synthetic:52:24x24", "--dump_path", str(folder)]
    codes, printed = Launched(script, *words).wait()
    assert codes == [2] and "num_images was 48 and is now 52" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_without_flags_learns_from_the_digits(name: str, tmp_path: Path) -> None:
    """Better than the untrained network; how much, and how soon, is the bench's."""
    script, _, _ = METHODS[name]
    version = ["--version", "1"] if name == "sela_v1" else []
    launched = Launched(script, *version, "--dump_path", str(tmp_path), env={"OMP_NUM_THREADS": "1"})
    codes, printed = launched.wait(timeout=600)
    assert codes == [0], printed
    path = tmp_path / "checkpoint.pth.tar"
    scores = {}
    for of_what, words in (("trained", ["--pretrained", str(path)]), ("untrained", ["--arch", "conv4"])):
        folder = tmp_path / of_what
        evaluation = ["--data_path", "digits", "--device", "cpu", "--nb_knn", "20", "--dump_path", str(folder)]
        codes, printed = Launched("eval_knn.py", *words, *evaluation).wait()
        assert codes == [0], printed
        scores[of_what] = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["top1"]
    assert scores["trained"] > scores["untrained"], scores


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("selfclassifier", "--cls_size 1000", "--cls_size 1000: there are only 48 images"),
        ("selfclassifier", "--queue_len 8", "--queue_len 8: a step has 16; give as many"),
        ("deepcluster", "--nmb_cluster 1", "--nmb_cluster 1: must be at least 2"),
        ("deepcluster", "--nmb_cluster 49", "--nmb_cluster 49: more clusters than the 48 images"),
        ("sela_v1", "--ncl 49", "--ncl 49: more clusters than the 48 images"),
        ("sela", "--nmb_prototypes 49 49", "--nmb_prototypes 49: there are only 48 images"),
        (
            "deepclusterv2",
            "--nmb_prototypes 12",
            "--nmb_prototypes has layers for only 1; add layers or name at most 1",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused_in_one_line(name: str, flags: str, said: str, tmp_path: Path) -> None:
    script, words, _ = METHODS[name]
    codes, printed = Launched(script, *SHARED, *words, "--dump_path", str(tmp_path / "run"), *flags.split()).wait()
    errors = [line for line in printed.splitlines() if "error:" in line]
    assert codes == [2] and len(errors) == 1 and said in errors[0], printed
    assert not (tmp_path / "run").exists()


def test_every_method_is_tested() -> None:
    scripts = {path.name for path in ROOT.glob("main_*.py")}
    assert {script for script, _, _ in METHODS.values()} == scripts


@pytest.mark.parametrize("name", [*METHODS, "labels"])
def test_advice_names_flags_that_the_script_has(name: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("path,head0\na.jpg,0\nb.jpg,3\n")
    script, flags, _ = {**METHODS, "labels": ("train_on_labels.py", ["--labels", str(labels)], [])}[name]
    plan = read_script(ROOT / script, [*SHARED, *flags], 1, 1)
    method = rehearse(plan, 48, 1, gpu=False).method
    assert "--base_lr" in method.remedies
    steps = [
        {"step": at, "loss": loss, "ln_k": 4.0, "rankme": rank} for at, rank in ((1, 9), (2, 1)) for loss in (4, 9)
    ]
    about = {"config": config.plain(plan.config), "facts": {"steps_per_epoch": 10}}
    page = [remark.text for step in steps for remark in verdict(RunRecord(Path("r"), "r", about=about, steps=[step]))]
    shared = [inspect.getsource(part) for part in (checkpoint.way_back, Loader.faster)]
    named = set(re.findall(r"--([a-z]\w+)", " ".join([method.remedies, *page, *shared]))) - {"short_side"}
    assert named <= {flag.name for flag in config.flags(plan.config)}
