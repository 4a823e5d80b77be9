"""Write a pretrained backbone as files that other software loads; every file is read back and compared first.

    python export.py --pretrained runs/mine/checkpoint.pth.tar --format torchvision onnx --output exported
    python export.py --pretrained swav_800ep_pretrain.pth.tar --format huggingface --push_to_hub USER/NAME

The last line about each file says how to load it.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl.data import MEAN
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.files import first_line
from clusterssl.log import log_to_screen
from clusterssl.models.download import is_url
from clusterssl.models.export import Exported, check_formats, export
from clusterssl.models.weights import model_from_weights

logger = logging.getLogger("clusterssl.export")


@dataclass(frozen=True)
class ExportOptions:
    """Files."""

    format: tuple[str, ...] = ("torchvision",)
    """one or several of torchvision, timm, safetensors, huggingface, onnx, torchscript, detectron2, detr"""
    output: str = "exported"
    """folder the files are written to"""
    name: str = ""
    """of the files; the architecture when empty"""
    head: bool = False
    """export projection head, prototypes and classifiers too, where the format can hold them"""
    overwrite: bool = False
    """replace files that exist"""
    push_to_hub: str = ""
    """USER/NAME of a repository on the Hugging Face Hub, made private if new, that the huggingface folder is uploaded
    to; nothing is uploaded without this flag"""

    def __post_init__(self) -> None:
        check_formats(self.format)
        wanted = not self.push_to_hub or "huggingface" in self.format
        cfg.require(
            wanted, f"--push_to_hub {self.push_to_hub}: uploads the huggingface folder; add --format huggingface"
        )
        cfg.require("/" not in self.name, f"--name {self.name}: a file name, without folders; those go to --output")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    files: ExportOptions = ExportOptions()


def open_exported(config: Config) -> Exported:
    """The network of the checkpoint, ready to be written."""
    options, path = config.network, config.network.pretrained
    cfg.require(bool(path), "--pretrained: name the checkpoint (file or URL) to export")
    network = inputs.open_network(options, data_path="", seed=0)
    return Exported(
        network.backbone.eval(), network.arch, network.stem, network.image_size,
        name=config.files.name or network.arch.replace(":", "_"),
        source=path if is_url(path) else Path(path).name,
        mean=MEAN, std=network.std,
        network=model_from_weights(path).eval() if config.files.head else None,
        results=results(Path(path), network.fingerprint),
    )  # fmt: skip


def results(checkpoint: Path, network: str) -> tuple[str, ...]:
    """What evaluations.jsonl beside a checkpoint says of its network, known by its fingerprint."""
    path = checkpoint.with_name("evaluations.jsonl")
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(text)
        except ValueError:  # a line cut short by a kill
            continue
        if record.get("network") == network:
            numbers = {key: value for key, value in record.items() if isinstance(value, float) and key != "time"}
            told = ", ".join(f"{key} {value:g}" for key, value in numbers.items())
            lines.append(f"{record.get('eval')} on {Path(record.get('data_path', '')).name}: {told}")
    return tuple(lines)


def upload(folder: Path, repository: str) -> None:
    """Send a folder to the Hugging Face Hub.

    Raises:
        UserError: huggingface-hub is not installed, or the upload failed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push_to_hub: needs huggingface-hub; run pip install huggingface-hub") from None
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the library's errors and its network layer's have no common base
        raise UserError(
            f"--push_to_hub {repository}: {first_line(error)}; the folder is {folder}, log in with 'hf auth login'"
        ) from error
    logger.info("uploaded to %s", repository)


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    log_to_screen(World())
    exported = open_exported(config)
    files = config.files
    written = export(exported, files.format, files.output, overwrite=files.overwrite)
    if files.push_to_hub:
        upload(written[list(files.format).index("huggingface")], files.push_to_hub)


if __name__ == "__main__":
    cfg.entry(main)
