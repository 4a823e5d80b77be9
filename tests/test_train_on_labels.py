"""The script train_on_labels.py, and the CSV files of pseudo-labels that it learns from."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression

import assign
import train_on_labels
from clusterssl.data import eval_batches, open_source
from clusterssl.errors import UserError
from clusterssl.files import read_checkpoint
from clusterssl.labelling.pseudo import IGNORED, read_labels
from clusterssl.models.build import build_backbone
from clusterssl.models.weights import backbone_from_weights, model_from_weights
from tests.evals.logs import restored_logger  # noqa: F401
from tests.launch import Launched, metrics, wait_for_step

TINY = ["--data_path", "synthetic:96:24x24", "--arch", "conv4w4", "--size_crops", "16", "--workers", "0"]
TINY += [
    "--device",
    "cpu",
    "--epochs",
    "2",
    "--batch_size",
    "16",
    "--log_freq",
    "1",
    "--base_lr",
    "0.1",
    "--report",
    "false",
]


def write(path: Path, names: list[str], *heads: np.ndarray) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"head{h}" for h in range(len(heads)))])
        writer.writerows(zip(names, *(head.tolist() for head in heads), strict=True))
    return path


def names_of(data_path: str) -> list[str]:
    source = open_source(data_path)
    return [source.name(i) for i in range(len(source))]


def start(*words: object) -> None:
    sys.argv = ["train_on_labels.py", *map(str, words)]
    train_on_labels.main()


def rotated_loss(state: dict, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The loss written out: nll of upright images, mean over heads, plus nll of the rotation over all four copies."""
    network = model_from_weights(state["path"]).train()
    rows, kinds = [], []
    for turns in range(4):
        for image in images:
            rows.append(torch.from_numpy(np.rot90(image.numpy(), turns, (1, 2)).copy()))
            kinds.append(turns)
    scores = [x.double().log_softmax(1) for x in network.scores([torch.stack(rows)])]
    upright = [-scores[h][range(len(images)), labels[h]].mean() for h in range(len(labels))]
    turned = -scores[-1][range(len(rows)), kinds].mean()
    return float((sum(upright) / len(upright) + turned).detach())


def test_loss_is_that_of_selas_retraining(tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), names_of("synthetic:96:24x24")
    labels = np.stack([rng.integers(0, 5, 96), rng.integers(0, 3, 96)])
    labels[:, 0] = 4, 2
    path = write(tmp_path / "labels.csv", names, *labels)
    start(*TINY, "--labels", path, "--rotation", "--dump_path", tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoint.pth.tar")
    network = model_from_weights(checkpoint).train()
    assert network.nmb_clusters == (5, 3, 4)
    config = train_on_labels.Config(labels=train_on_labels.LabelOptions(str(path), rotation=True))

    class Here:
        loader = type("Loader", (), {"source": open_source("synthetic:96:24x24")})
        device = torch.device("cpu")

    method = train_on_labels.OnLabels(read_labels(str(path)), network, config, Here())  # type: ignore[arg-type]
    images, index = torch.randn(6, 3, 16, 16), torch.tensor([3, 90, 5, 7, 40, 41])
    expected = rotated_loss({"path": checkpoint}, images, torch.from_numpy(labels[:, index]))
    assert float(method.loss([images], index)) == pytest.approx(expected, abs=1e-5)


def few_labels_accuracy(backbone: torch.nn.Module) -> float:
    """Of a logistic regression on 10 labels a class, mean of five draws; percent."""
    splits = []
    for split in ("train", "val"):
        source = open_source("digits", split=split)
        with torch.no_grad():
            rows = [backbone.eval()(batch.images) for batch in eval_batches(source, image_size=32)]
        splits.append((torch.cat(rows).numpy(), source.labels))
    (train, labels), (test, truth) = splits
    mean, scale = train.mean(0), train.std(0) + 1e-6
    found = []
    for draw in range(5):
        rng = np.random.default_rng(draw)
        chosen = np.concatenate([rng.choice(np.flatnonzero(labels == c), 10, replace=False) for c in range(10)])
        probe = LogisticRegression(max_iter=2000).fit((train[chosen] - mean) / scale, labels[chosen])
        found.append(100 * probe.score((test - mean) / scale, truth))
    return float(np.mean(found))


def test_features_of_the_retrained_network_beat_the_untrained_one(tmp_path: Path) -> None:
    """Labels are clusters of raw pixels: no class label is used anywhere."""
    source = open_source("digits")
    pixels = np.stack([source.load(i)[0, ::4, ::4].numpy().ravel() for i in range(len(source))]) / 255
    heads = [KMeans(k, n_init=2, random_state=k).fit_predict(pixels) for k in (20, 30)]
    path = write(tmp_path / "labels.csv", names_of("digits"), *heads)
    start("--labels", path, "--epochs", 10, "--seed", 3, "--device", "cpu", "--dump_path", tmp_path / "run")
    torch.manual_seed(3)
    untrained = few_labels_accuracy(build_backbone("conv4", "small"))
    trained = few_labels_accuracy(backbone_from_weights(str(tmp_path / "run" / "checkpoint.pth.tar")))
    assert trained > untrained + 4


def test_labels_of_a_run_are_exported_and_learned(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--version", "1", "--hc", "2", "--ncl", "6", "--nopts", "4", *TINY, "--dump_path", str(run)]
    codes, printed = Launched("main_sela.py", *words).wait()
    assert codes == [0], printed
    sys.argv = ["assign.py", "--pretrained", str(run), "--labels", "--out", str(tmp_path / "pseudo.csv")]
    assign.main()
    found = read_labels(str(tmp_path / "pseudo.csv"))
    kept = read_checkpoint(run / "checkpoint.pth.tar")["method_state"]["labels"]
    assert (found.labels_HN == kept.numpy()).all() and found.names == names_of("synthetic:96:24x24")
    with pytest.raises(UserError, match=r"pseudo.csv: exists"):
        assign.main()
    start(*TINY, "--labels", tmp_path / "pseudo.csv", "--dump_path", tmp_path / "again")
    assert model_from_weights(str(tmp_path / "again" / "checkpoint.pth.tar")).nmb_clusters == tuple(found.sizes)


def test_resumes_with_the_same_weights_and_refuses_other_labels(tmp_path: Path) -> None:
    labels = np.arange(96) % 5
    path = write(tmp_path / "labels.csv", names_of("synthetic:96:24x24"), labels)
    words = [*TINY, "--labels", path, "--rotation", "--checkpoint_minutes", "0"]
    start(*words, "--dump_path", tmp_path / "whole")
    launched = Launched("train_on_labels.py", *map(str, words), "--dump_path", str(tmp_path / "killed"))
    wait_for_step(tmp_path / "killed", 3, launched)
    launched.send(9)
    launched.wait()
    assert (tmp_path / "killed" / "checkpoint.pth.tar").exists() and len(metrics(tmp_path / "killed")) < 13
    start(*words, "--dump_path", tmp_path / "killed")
    whole, killed = (read_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "killed"))
    assert all(torch.equal(whole["state_dict"][name], killed["state_dict"][name]) for name in whole["state_dict"])
    write(path, names_of("synthetic:96:24x24"), (labels + 1) % 5)
    with pytest.raises(UserError, match="not the labels that this run began with"):
        start(*words, "--epochs", 3, "--dump_path", tmp_path / "killed")


def test_a_moved_dataset_and_missing_rows(tmp_path: Path) -> None:
    names = names_of("synthetic:96:24x24")
    moved = [f"elsewhere/{name.split('/')[-1]}" for name in names]
    path = write(tmp_path / "labels.csv", moved[:90], np.arange(90) % 7)
    labels = read_labels(str(path)).of(open_source("synthetic:96:24x24"))
    assert labels[0, :90].tolist() == [i % 7 for i in range(90)] and (labels[0, 90:] == IGNORED).all()


def test_labels_of_assign_are_such_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(
        "path,cluster,confidence,second,second_confidence\na,3,0.9,1,0.1\nb,1,0.5,3,.5\n"
    )
    found = read_labels(str(tmp_path / "labels.csv"))
    assert found.labels_HN.tolist() == [[3, 1]] and found.sizes == [4]


def test_bad_input(tmp_path: Path) -> None:
    names = names_of("synthetic:96:24x24")
    good = write(tmp_path / "good.csv", names, np.arange(96) % 5)
    for text, message in (
        ("", "not a readable CSV"), ("a,b\n1,2\n", "not a readable CSV"), ("path,head0\n", "has no labels"),
        ("path\na\n", "has no labels"), ("path,head0\na,x\n", "not a readable CSV"),
        ("path,head0\na\n", "not a readable CSV"),
        ("path,head0\na,-100\n", "a column without any label"), ("path,head0\nz,1\n", "names none of the images"),
    ):  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            start(*TINY, "--labels", tmp_path / "bad.csv", "--dump_path", tmp_path / "run")
        assert len(str(caught.value).splitlines()) == 1
    for words, message in (
        ([], "--labels: name the CSV"), (["--labels", tmp_path / "none.csv"], "not a readable CSV"),
        (["--labels", good, "--rotation", "--size_crops", "16x12"], "--rotation: needs square crops"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            start(*TINY, *words, "--dump_path", tmp_path / "run")
    swav = tmp_path / "swav"
    codes, printed = Launched("main_swav.py", *TINY, "--nmb_prototypes", "6", "--nmb_crops", "2", "--dump_path",
                              str(swav)).wait()  # fmt: skip
    assert codes == [0], printed
    for run, message in ((swav, "swav keeps no labels"), (tmp_path, "holds no run.json")):
        sys.argv = ["assign.py", "--pretrained", str(run), "--labels", "--out", str(tmp_path / "x.csv")]
        with pytest.raises(UserError, match=message):
            assign.main()
