"""Several evaluations of several checkpoints in one go, and the table of what they found."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clusterssl import dist
from clusterssl.config import plain, require
from clusterssl.errors import UserError
from clusterssl.evals.clusters import ClusterOptions, find_clusters, open_hierarchies, records
from clusterssl.evals.finetuning import FinetuneOptions, finetune
from clusterssl.evals.neighbours import KnnOptions, nearest_neighbours
from clusterssl.evals.probing import ClassifierOptions, linear
from clusterssl.evals.setup import Setup
from clusterssl.evals.subsets import LabelOptions
from clusterssl.evals.training import SgdOptions
from clusterssl.files import atomic_write, first_line
from clusterssl.models.download import is_url
from clusterssl.report.tables import Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProtocolOptions:
    """Protocols; what has no flag here is as each script's default."""

    protocols: tuple[str, ...] = ("knn", "linear", "clusters")
    """any of knn, linear, clusters, semisup"""
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """knn: numbers of neighbours k"""
    linear_epochs: int = 100
    """linear: passes over the images"""
    linear_lr: float = 0.3
    """linear: initial learning rate"""
    linear_batch_size: int = 32
    """linear: images per rank and step"""
    train_augmentation: Literal["auto", "rrc", "none"] = "auto"
    """linear: rrc, none or auto, see eval_linear.py"""
    kk: int = 0
    """clusters: number of clusters of k-means; 0: the network's own clusters, or as many as classes"""
    superclass: tuple[str, ...] = ()
    """clusters: superclasses to compare with, too"""
    labels_perc: tuple[float, ...] = (1.0, 10.0)
    """semisup: shares of labelled images, in percent"""
    label_list: str = ""
    """semisup: see eval_semisup.py"""
    semisup_epochs: int = 20
    """semisup: passes over the labelled images"""
    semisup_batch_size: int = 32
    """semisup: images per rank and step"""
    semisup_lr: tuple[float, ...] = (0.02, 0.01)
    """semisup: learning rate of the trunk for each share"""
    semisup_lr_last_layer: tuple[float, ...] = (5.0, 0.2)
    """semisup: learning rate of the classifier for each share"""

    def __post_init__(self) -> None:
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        require(not unknown, f"--protocols {' '.join(unknown)}: unknown; choose from {', '.join(PROTOCOLS)}")
        counts = {len(self.labels_perc), len(self.semisup_lr), len(self.semisup_lr_last_layer)}
        require(len(counts) == 1, "--labels_perc, --semisup_lr, --semisup_lr_last_layer: give as many values of each")


Found = tuple[str, dict[str, Any], dict[str, float]]
"""kind of evaluation, its record, and the columns of the table it fills"""


def _knn(setup: Setup, options: ProtocolOptions) -> Iterator[Found]:
    for record in nearest_neighbours(setup, KnnOptions(nb_knn=options.nb_knn), LabelOptions()):
        yield "knn", record, {f"knn {record['k']} top-1": record["top1"]}


def _linear(setup: Setup, options: ProtocolOptions) -> Iterator[Found]:
    classifier = ClassifierOptions(train_augmentation=options.train_augmentation)
    optim = SgdOptions(epochs=options.linear_epochs, lr=options.linear_lr, batch_size=options.linear_batch_size)
    flags = {**plain(classifier), **plain(optim), "seed": setup.seed}
    for record in linear(setup, classifier, optim, flags, str(Path(setup.dump_path) / "linear")):
        yield "linear", record, {"linear top-1": record["top1"], "linear top-5": record["top5"]}


def _clusters(setup: Setup, options: ProtocolOptions) -> Iterator[Found]:
    chosen = ClusterOptions(kk=options.kk, superclass=options.superclass)
    hierarchies = open_hierarchies(setup, chosen)
    for found in find_clusters(setup, chosen):
        for record in records(found, hierarchies):
            above = f" ({record['superclass']})" if record["superclass"] else ""
            names = ("accuracy",) if above else ("accuracy", "hungarian_accuracy", "nmi", "ami", "ari")
            columns = {name: f"clusters {name.removesuffix('_accuracy')}{above}" for name in names}
            yield "clusters", record, {column: record[name] for name, column in columns.items()}


def _semisup(setup: Setup, options: ProtocolOptions) -> Iterator[Found]:
    for share, lr, last in zip(options.labels_perc, options.semisup_lr, options.semisup_lr_last_layer, strict=True):
        tuned = FinetuneOptions(
            labels_perc=share, label_list=options.label_list, epochs=options.semisup_epochs, lr=lr, lr_last_layer=last,
            batch_size=options.semisup_batch_size,
        )  # fmt: skip
        folder = str(Path(setup.dump_path) / f"semisup{share:g}")
        flags = {**plain(tuned), "seed": setup.seed}
        for record in finetune(setup.reopened(), tuned, flags, folder):
            yield "semisup", record, {f"semisup {share:g} % top-1": record["top1"]}


PROTOCOLS: dict[str, Callable[[Setup, ProtocolOptions], Iterator[Found]]] = {
    "knn": _knn, "linear": _linear, "clusters": _clusters, "semisup": _semisup,
}  # fmt: skip


@dataclass
class Comparison:
    """What was found, checkpoint by checkpoint."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    """for each checkpoint the columns of the table"""
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def evaluate(self, name: str, pretrained: str, setup: Setup, options: ProtocolOptions) -> None:
        """Run all protocols on one checkpoint; what one cannot do is noted, and the others go on.

        Args:
            name: of the checkpoint in the table.
            pretrained: its file.
            setup: the images, and any network; `setup.dump_path` gets a folder for this checkpoint.
            options: protocols.
        """
        row, folder = self.rows.setdefault(name, {}), str(Path(setup.dump_path) / name)
        try:
            own = setup.of(pretrained, folder)
        except UserError as error:
            self.failures.append(f"{name}: {error}")
            logger.warning("%s: %s", name, error)
            return
        for number, protocol in enumerate(options.protocols):
            logger.info("=== %s: %s", name, protocol)
            try:
                own = own.reopened() if number else own
                for kind, record, columns in PROTOCOLS[protocol](own, options):
                    own.record(kind, record)
                    self.records.append({"checkpoint": name, "protocol": protocol, **record})
                    row |= columns
            except UserError as error:
                self.failures.append(f"{name}, {protocol}: {error}")
                logger.warning("%s: %s failed: %s", name, protocol, error)

    def table(self, title: str) -> Table:
        """One row a checkpoint, one column a number."""
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        rows = tuple(
            (name, *(f"{row[column]:.2f}" if column in row else "-" for column in columns))
            for name, row in self.rows.items()
        )
        return Table(title, ("checkpoint", *columns), rows, "; ".join(self.failures))

    def write(self, folder: Path, title: str) -> list[Path]:
        """Write table.md, table.csv and table.json (rank 0); returns their paths.

        Raises:
            UserError: the folder cannot be written.
        """
        table, text = self.table(title), io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [table.columns, *[[name, *(row.get(c, "") for c in table.columns[1:])] for name, row in self.rows.items()]]
        )
        whole = {"title": title, "rows": self.rows, "records": self.records, "failures": self.failures}
        texts = {"md": markdown(table), "csv": text.getvalue(), "json": json.dumps(whole, indent=1) + "\n"}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--dump_path {folder}: cannot be written ({first_line(error)}); choose another") from error
        return [_write(folder / f"table.{ending}", content) for ending, content in texts.items()]


def _write(path: Path, text: str) -> Path:
    if dist.rank() == 0:
        atomic_write(path, lambda file: file.write(text.encode("utf-8")))
    return path


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [
        table.columns, ["---", *["---:"] * (len(table.columns) - 1)],
        *[[cell.replace("|", "\\|") for cell in row] for row in table.rows],
    ]  # fmt: skip
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table.title}\n\n{body}\n" + (f"\n{table.note}\n" if table.note else "")


def names_of(checkpoints: Sequence[str]) -> dict[str, str]:
    """A short name, also for a folder, for each checkpoint: its run directory's, or its file's.

    Raises:
        UserError: the same checkpoint twice, or no such file.
    """
    if len(set(checkpoints)) < len(checkpoints):
        raise UserError("--pretrained: names a checkpoint twice; leave one out")
    for checkpoint in checkpoints:
        if checkpoint and not is_url(checkpoint) and not Path(checkpoint).is_file():
            raise UserError(f"--pretrained {checkpoint}: no such checkpoint file; check the path")
    names: dict[str, str] = {}
    for checkpoint in checkpoints:
        path = Path(checkpoint.split("?")[0])
        own = path.name.startswith("checkpoint.pth") and path.absolute().parent.name
        name = own or path.name.split(".")[0] or "untrained"
        free = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        names[checkpoint] = next(candidate for candidate in free if candidate not in names.values())
    return names
