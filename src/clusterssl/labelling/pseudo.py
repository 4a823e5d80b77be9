"""Pseudo-labels of a training run as a CSV, and such a CSV as labels to train on.

Columns: path, then one column of whole numbers for each head, -100 (or nothing) where an image has no label.

Legend of suffixes: N images, H heads.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clusterssl.data import Source, fingerprint, open_source
from clusterssl.data.unseen import Unseen
from clusterssl.errors import UserError
from clusterssl.files import first_line, read_checkpoint
from clusterssl.labelling.tables import write_csv
from clusterssl.report.records import read_json

logger = logging.getLogger(__name__)

IGNORED = -100
_NOT_LABELS = {"confidence", "second", "second_confidence"}


def export_labels(run: Path, out: Path) -> tuple[int, int]:
    """Write the labels that a run's newest checkpoint holds for its own training images; returns images and heads.

    Args:
        run: directory of a run of DeepCluster, DeepCluster-v2, SeLa or SeLa-v2.
        out: CSV file.

    Raises:
        UserError: no such run; a method that keeps no labels; images that are gone or others; the file is there.
    """
    about = read_json(run / "run.json")
    if "config" not in about or "facts" not in about:
        raise UserError(f"{run}: holds no run.json of ours; give the directory of a run (--dump_path of a training)")
    if out.exists():
        raise UserError(f"--out {out}: exists; name another file")
    state = read_checkpoint(run / "checkpoint.pth.tar")
    labels = state.get("method_state", {}).get("labels")
    if labels is None:
        raise UserError(
            f"{run}: {about.get('method', 'this method')} keeps no labels between steps; let assign.py --images "
            "predict them instead of --labels"
        )
    table_HN = np.atleast_2d(labels.numpy())
    config = about["config"]
    source = open_source(config["data_path"], subset_file=config.get("subset_file", ""))
    if len(source) != table_HN.shape[1] or fingerprint(source) != about["facts"].get("dataset_hash"):
        raise UserError(f"{config['data_path']}: holds other images than the run {run} was trained on; restore them")
    write_csv(out, ("path", *(f"head{h}" for h in range(len(table_HN)))), _rows(table_HN, source))
    return len(source), len(table_HN)


def _rows(table_HN: NDArray[Any], source: Source) -> Iterator[tuple[Any, ...]]:
    for i, labels_H in enumerate(table_HN.T.tolist()):
        yield source.name(i), *(label if label >= 0 else IGNORED for label in labels_H)


class LabelFile(NamedTuple):
    """What a CSV says."""

    path: str
    names: list[str]
    labels_HN: NDArray[np.int32]

    @property
    def sizes(self) -> list[int]:
        """Clusters of each head: the largest label and one."""
        return [int(labels_N.max()) + 1 for labels_N in self.labels_HN]

    def of(self, source: Source) -> NDArray[np.int32]:
        """Labels [H, N] of these images, `IGNORED` where the file has none.

        Names agree in full, or below the folder that each side's have in common, so that a dataset may have moved.
        Images that nobody looks at all get label 0.

        Raises:
            UserError: the file names none of the images.
        """
        if isinstance(source, Unseen):
            return np.zeros((len(self.labels_HN), len(source)), dtype=np.int32)
        names = [source.name(i) for i in range(len(source))]
        found = self._matched(names, self.names)
        if (found < 0).all():
            found = self._matched(_below_common(names), _below_common(self.names))
        if (found < 0).all():
            raise UserError(
                f"--labels {self.path}: names none of the images (it has {self.names[0]}, they are like {names[0]})"
            )
        missing = int((found < 0).sum())
        if missing:
            logger.warning("--labels %s: %d of %d images have no label and are not learned from", self.path, missing,
                           len(source))  # fmt: skip
        return np.where(found < 0, IGNORED, self.labels_HN[:, found]).astype(np.int32)

    @staticmethod
    def _matched(names: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
        row = {name: at for at, name in enumerate(known)}
        return np.array([row.get(name, -1) for name in names])


def _below_common(names: Sequence[str]) -> list[str]:
    start = len(os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))]))  # noqa: PTH120
    return [name[start:].lstrip("/") for name in names]


def read_labels(path: str) -> LabelFile:
    """Read a CSV of `export_labels`, or the labels.csv of assign.py.

    Raises:
        UserError: no such file, or not such a table.
    """
    if not path:
        raise UserError("--labels: name the CSV of the labels (path, one column for each head)")
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = csv.reader(file)
        at = header.index("path")
        columns = [i for i, name in enumerate(header) if i != at and name not in _NOT_LABELS]
        names = [row[at] for row in rows]
        table_HN = np.array([[_label(row[i]) for row in rows] for i in columns], dtype=np.int32)
    except (OSError, ValueError, IndexError) as error:
        told = first_line(error)
        raise UserError(f"--labels {path}: not a readable CSV of path and whole-number labels ({told})") from error
    if not columns or not names:
        raise UserError(f"--labels {path}: has no labels; columns are path and one for each head")
    if (table_HN.max(1) < 0).any():
        raise UserError(f"--labels {path}: a column without any label; remove it")
    return LabelFile(path, names, table_HN)


def _label(word: str) -> int:
    number = int(word) if word else IGNORED
    return number if number >= 0 else IGNORED
