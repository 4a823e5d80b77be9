"""The script export.py from command line to files."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import export
from clusterssl import config as cfg
from clusterssl.evals import inputs
from clusterssl.models.build import build_model
from clusterssl.models.headed import build_headed
from clusterssl.models.selfclassifier import build_selfclassifier
from clusterssl.models.weights import published_state_dict
from tests.evals.logs import restored_logger  # noqa: F401

NETWORKS = {
    "swav": lambda: build_model("resnet18", "imagenet", 16, 8, 5),
    "sela": lambda: build_headed("resnet18", "imagenet", (5, 6)),
    "selfclassifier": lambda: build_selfclassifier("resnet18", "imagenet", (7,), hidden_dim=8, dim=4),
}


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of the script."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cfg.entry(export.main)
    return int(end.value.code or 0)


@pytest.mark.parametrize("method", NETWORKS)
@pytest.mark.parametrize("own", [True, False], ids=["own", "published"])
def test_checkpoints_of_all_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, own: bool
) -> None:
    network = NETWORKS[method]()
    state = published_state_dict(network)
    meta = {**network.record(), "size_crops": [[64, 64]]}
    torch.save({"state_dict": state, "model": meta} if own else state, tmp_path / "weights.pth")
    flags = ["--pretrained", tmp_path / "weights.pth", "--output", tmp_path / "out", "--image_size", 64]
    assert run(monkeypatch, *flags, "--format", "torchvision", "safetensors", "--name", "mine") == 0
    written = torch.load(tmp_path / "out" / "mine.torchvision.pth", weights_only=True)
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(written.pop(name), tensor), name
    assert not written
    assert "torchvision.models.resnet18()" in capsys.readouterr().out
    card = (tmp_path / "out" / "mine.safetensors.md").read_text()
    assert "| weights from | weights.pth |" in card and str(tmp_path) not in card
    assert ("0.228" in card) == (method == "swav")


def test_evaluations_go_into_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = build_model("conv4w4", "small", 8, 4, 5)
    torch.save(
        {"state_dict": published_state_dict(network), "model": network.record()}, tmp_path / "checkpoint.pth.tar"
    )
    record = {"time": 1.5, "eval": "knn", "k": 20, "top1": 61.25, "pretrained": "runs/a/checkpoint.pth.tar",
              "network": inputs.fingerprint(network.backbone), "data_path": "/data/digits"}  # fmt: skip
    other = {**record, "network": "that of another run", "top1": 1.0}
    text = "\n".join([json.dumps(record), json.dumps(other), '{"torn'])
    (tmp_path / "evaluations.jsonl").write_text(text)
    flags = ["--pretrained", tmp_path / "checkpoint.pth.tar", "--output", tmp_path, "--image_size", 24]
    assert run(monkeypatch, *flags, "--format", "safetensors", "--head") == 0
    card = (tmp_path / "conv4w4.safetensors.md").read_text()
    assert "- knn on digits: top1 61.25" in card and "top1 1" not in card and "with heads" in card


def test_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(published_state_dict(NETWORKS["swav"]()), tmp_path / "weights.pth")
    flags = ["--pretrained", str(tmp_path / "weights.pth"), "--output", str(tmp_path / "out")]
    for words, message in (
        ([], "--pretrained: name the checkpoint"),
        (["--pretrained", "/no/such/file"], "/no/such/file"),
        ([*flags, "--arch", "resnet50"], "the file looks like resnet18"),
        ([*flags, "--format", "onx"], "--format onx: choose among"),
        ([*flags, "--name", "a/b"], "--name a/b"),
        ([*flags, "--push_to_hub", "me/mine"], "add --format huggingface"),
    ):
        assert run(monkeypatch, *words) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and message in error, error
    assert not (tmp_path / "out").exists()


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that knows nobody."""

    def do_POST(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Paths of the requests that a refusing hub got."""
    api = pytest.importorskip("huggingface_hub")
    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    server.paths = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(api, "HfApi", lambda: api.hf_api.HfApi(endpoint=address, token=False))
    yield server.paths  # type: ignore[attr-defined]
    server.shutdown()


def test_upload_only_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_model("conv4w4", "small", 8, 4, 5)
    torch.save({"state_dict": published_state_dict(network), "model": network.record()}, tmp_path / "weights.pth")
    flags = ["--pretrained", tmp_path / "weights.pth", "--output", tmp_path, "--image_size", 24]
    assert run(monkeypatch, *flags, "--format", "huggingface") == 0 and not hub
    capsys.readouterr()
    assert run(monkeypatch, *flags, "--format", "huggingface", "--overwrite", "--push_to_hub", "me/mine") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "--push_to_hub me/mine" in error and "hf auth login" in error
    assert hub == ["/api/repos/create"]
