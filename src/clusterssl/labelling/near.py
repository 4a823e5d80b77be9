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
from clusterssl.labelling.pages import square, thumbnails
from clusterssl.labelling.reading import Reader
from clusterssl.labelling.scan import Scan
from clusterssl.labelling.tables import write_csv
from clusterssl.report import Gallery
from clusterssl.report.page import write_page

logger = logging.getLogger(__name__)

_A_STRIP = 12
_COPIES = 8
"""of a picture that are looked for among the images nearest to it"""
_OF_COPIES = 0.99
"""cosine above which an image may be a copy"""


_LEAD = (
    "Each picture asked about, then the images whose features point most nearly the same way (cosine 1 is the same "
    "direction), without the picture itself. Names and cosines are in near.csv."
)


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
    """Write near.csv and near.html, without the images that are the picture asked about itself.

    Raises:
        UserError: they cannot be written.
    """
    cosine_QE, positions_QE = nearest_to(scan, queries_QF, count + _COPIES)
    found = [
        _others(source, square(asked, query), cosine_QE[query].tolist(), positions)[:count]
        for query, positions in enumerate(positions_QE)
    ]
    rows = (
        (asked.name(query), rank, source.name(position), f"{cosine:.6f}")
        for query, others in enumerate(found)
        for rank, (position, cosine) in enumerate(others, 1)
    )
    write_csv(out / "near.csv", ("near", "rank", "path", "cosine"), rows)
    _write_page(out / "near.html", source, asked, found)
    logger.info("written: %s", out / "near.html")


def _others(
    source: Source, picture: NDArray[np.uint8], cosine_E: list[float], positions_E: NDArray[np.int64]
) -> list[tuple[int, float]]:
    """Positions and cosines of the images of which the network saw other pixels than of the picture."""
    return [
        (position, cosine)
        for position, cosine in zip(positions_E.tolist(), cosine_E, strict=True)
        if cosine < _OF_COPIES or not np.array_equal(square(source, position), picture)
    ]


def _write_page(path: Path, source: Source, asked: Source, found: list[list[tuple[int, float]]]) -> None:
    """Each picture asked about, then the images nearest to it."""
    galleries = []
    for query, others in enumerate(found):
        name = Path(asked.name(query)).name
        positions = [position for position, _ in others]
        best = f"cosine {others[0][1]:.3f} to {others[-1][1]:.3f}" if others else "There is no other image."
        strips = [(f"{name}, asked about", f"The picture {name}", thumbnails(asked, [query]))]
        for start in range(0, len(positions), _A_STRIP):
            part = positions[start : start + _A_STRIP]
            words = f"nearest {start + 1} to {start + len(part)}"
            strips.append((words, f"Images {words} to {name}", thumbnails(source, part)))
        galleries.append(Gallery(name, tuple(strips), best, wide=True))
    write_page(path, title="Nearest images", lead=_LEAD, galleries=galleries)
