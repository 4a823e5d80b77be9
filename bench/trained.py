"""What benches of whole trainings share: a run with its costs, the untrained network, accuracies by our scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.evals.features import calibrate_batchnorm
from clusterssl.models.build import build_model
from clusterssl.models.weights import published_state_dict

ROOT = Path(__file__).resolve().parents[1]
K = 20


def run_with_costs(words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a training, unless it was done, on one thread.

    Args:
        words: command line.
        folder: its run directory, where the costs are kept in costs.json.
        env: variables besides those of this process.

    Returns:
        CPU time from start to end in seconds (cpu_seconds), that of the clock (seconds), peak memory (memory_mib).

    Raises:
        UserError: it failed.
    """
    costs = folder / "costs.json"
    if not costs.exists():
        began = time.monotonic()
        process = subprocess.Popen(list(words), env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"{folder.name} ended with exit code {process.returncode}; see above")
        seconds = {"cpu_seconds": used.ru_utime + used.ru_stime, "seconds": time.monotonic() - began}
        costs.write_text(json.dumps({**seconds, "memory_mib": used.ru_maxrss / 1024}))
    return dict(json.loads(costs.read_text()))


def untrained(about: dict[str, Any], images: Callable[[], Iterable[Tensor]], folder: Path, seed: int) -> list[Path]:
    """Files of a network before training: as initialised, and with BatchNorm statistics of the training images.

    Args:
        about: what a checkpoint says of its network: arch, stem, size_crops, hidden_mlp, feat_dim, nmb_prototypes.
        images: gives batches B x 3 x H x W of training images.
        folder: the files lie in untrained-SEED-CALIBRATED below it.
        seed: of the weights.
    """
    paths = []
    for calibrated in (False, True):
        torch.manual_seed(seed)
        sizes = about["hidden_mlp"], about["feat_dim"], about["nmb_prototypes"]
        model = build_model(about["arch"], about["stem"], *sizes)
        if calibrated:
            calibrate_batchnorm(model.backbone, images())
        paths.append(folder / f"untrained-{seed}-{calibrated}" / "network.pth")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        record = {name: about[name] for name in ("arch", "stem", "size_crops")}
        torch.save({"state_dict": published_state_dict(model), "model": {**record, **model.record()}}, paths[-1])
    return paths


def better(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By each measure the best of several networks, so that a gain over them is not flattered."""
    return {key: max(one[key] for one in found) for key in found[0]}


def accuracies(path: Path, data_path: str, split: str, linear: Sequence[str] = ("--epochs", "20")) -> dict[str, float]:
    """Accuracy in percent by our evaluation scripts: k-NN (k = 20), and a linear probe on frozen features.

    Args:
        path: checkpoint; results are kept beside it and used again.
        data_path: images with labels, those to learn from in train.
        split: name of the images that are scored.
        linear: flags of the linear probe.
    """
    found = {}
    for name, script, more in (("knn", "eval_knn", ["--nb_knn", str(K)]), ("linear", "eval_linear", [*linear])):
        written = path.parent / script / "evaluations.jsonl"
        if not written.exists():
            words = ["--val_split", split, *more, "--device", "cpu", "--workers", "0"]
            top1(script, path, data_path, *words, env={"OMP_NUM_THREADS": "1"})
        found[name] = float(json.loads(written.read_text().splitlines()[-1])["top1"])
    return found


def top1(script: str, path: Path, data_path: str, *flags: str, env: Mapping[str, str] | None = None) -> float:
    """Accuracy in percent that one of our evaluation scripts finds; its records go beside the weights."""
    folder = path.parent / script
    command = [sys.executable, str(ROOT / f"{script}.py"), "--data_path", data_path, "--pretrained", str(path)]
    command += ["--dump_path", str(folder), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})
    return float(json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["top1"])


def unpacked(data_path: str, folder: Path) -> str:
    """A folder of images: `data_path`, or where it is an archive, what it holds, unpacked once into `folder`."""
    if not Path(data_path).is_file():
        return data_path
    done = folder / ".unpacked"
    if not done.exists():
        with tarfile.open(data_path) as tar:
            tar.extractall(folder, filter="data")
        done.touch()
    return str(folder)
