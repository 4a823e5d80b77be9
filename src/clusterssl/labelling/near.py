"""Which images of a scanned folder are nearest to some pictures.

Legend of suffixes: Q pictures asked about, F features, E nearest images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data import BadImageError, Source, eval_batches, resize_for
from clusterssl.data.listing import Listing, Names
from clusterssl.data.source import FileSource
from clusterssl.errors import UserError
from clusterssl.evals.inputs import Network
from clusterssl.labelling.neighbourhood import nearest_to
from clusterssl.labelling.pages import thumbnails
from clusterssl.labelling.reading import Reader
from clusterssl.labelling.scan import Scan
from clusterssl.labelling.tables import write_csv
from clusterssl.report import Gallery
from clusterssl.report.page import write_page

logger = logging.getLogger(__name__)

_A_STRIP = 12


def pictures(paths: Sequence[str]) -> Source | None:
    """The pictures asked about, all readable; None where there are none.

    Raises:
        UserError: one of them is no image.
    """
    whole = [str(Path(path).expanduser().absolute()).lstrip("/") for path in paths]
    asked = FileSource(Listing(Names("", whole), np.full(len(whole), -1, dtype=np.int64), []))
    for i, path in enumerate(paths):
        try:
            asked.load(i)
        except BadImageError as error:
            raise UserError(f"--near {path}: {error}; name an image file") from error
    return asked if paths else None


def read(reader: Reader, asked: Source, network: Network) -> Tensor:
    """Features of the pictures, float32 [Q, F] of unit length."""
    device = next(reader.parameters()).device
    batches = eval_batches(
        asked, image_size=network.image_size, resize=resize_for(network.image_size), batch_size=64, device=device,
        std=network.std,
    )  # fmt: skip
    return torch.cat([reader(batch.images).features_BF for batch in batches])


def write_near(out: Path, scan: Scan, source: Source, asked: Source, queries_QF: Tensor, count: int) -> None:
    """Write near.csv and near.html.

    Raises:
        UserError: they cannot be written.
    """
    cosine_QE, positions_QE = nearest_to(scan, queries_QF, count)
    rows = (
        (asked.name(query), rank + 1, source.name(int(position)), f"{cosine_QE[query, rank]:.6f}")
        for query, positions in enumerate(positions_QE)
        for rank, position in enumerate(positions)
    )
    write_csv(out / "near.csv", ("near", "rank", "path", "cosine"), rows)
    _write_page(out / "near.html", source, asked, cosine_QE, positions_QE)
    logger.info("written: %s", out / "near.html")


def _write_page(path: Path, source: Source, asked: Source, cosine_QE: Tensor, positions_QE: NDArray[np.int64]) -> None:
    """Each picture asked about, then the images nearest to it."""
    galleries = []
    for query, positions in enumerate(positions_QE):
        name = Path(asked.name(query)).name
        best = f"cosine {cosine_QE[query, 0]:.3f} to {cosine_QE[query, -1]:.3f}"
        strips = [(f"{name}, asked about", f"The picture {name}", thumbnails(asked, [query]))]
        for start in range(0, len(positions), _A_STRIP):
            part = positions[start : start + _A_STRIP]
            words = f"nearest {start + 1} to {start + len(part)}"
            strips.append((words, f"Images {words} to {name}", thumbnails(source, part)))
        galleries.append(Gallery(name, tuple(strips), best, wide=True))
    write_page(path, title="Nearest images", lead="Names and cosines are in near.csv.", galleries=galleries)
