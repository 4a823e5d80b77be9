"""Neighbours, duplicates and outliers against brute force and against what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clusterssl.labelling import neighbourhood
from clusterssl.labelling.neighbourhood import duplicates, nearest_to, neighbours_of_all, outliers
from clusterssl.labelling.scan import Scan

CPU = torch.device("cpu")


def scan_of(
    folder: Path, features_NF: np.ndarray, grey_NP: np.ndarray | None = None, bad: tuple[int, ...] = ()
) -> Scan:
    """A finished pass with these features at unit length."""
    folder.mkdir(exist_ok=True)
    unit = features_NF / np.linalg.norm(features_NF, axis=1, keepdims=True)
    np.save(folder / "features.npy", unit.astype(np.float32))
    np.save(folder / "grey.npy", np.zeros((len(unit), 256), np.uint8) if grey_NP is None else grey_NP)
    scan = Scan(folder, {"images": len(unit)})
    scan.done, scan.bad = len(unit), list(bad)
    return scan


def brute_force(features_NF: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and indices of the nearest others, in float64."""
    unit = features_NF.astype(np.float64) / np.linalg.norm(features_NF, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1)[:, :count]
    return np.take_along_axis(cosine, order, 1), order


def test_neighbours_are_those_of_brute_force(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(700, 12))
    cosine, index = neighbours_of_all(scan_of(tmp_path, features), 4, seed=1, device=CPU)
    expected_cosine, expected = brute_force(features, 4)
    assert (index.numpy() == expected).all()
    np.testing.assert_allclose(cosine.numpy(), expected_cosine, atol=1e-6)


def test_cells_miss_few_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbourhood, "CELL", 100)
    monkeypatch.setattr(neighbourhood, "_IMAGES_OF_A_CELL", 150)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 16))[rng.integers(20, size=1500)] + 0.3 * rng.normal(size=(1500, 16))
    cosine, index = neighbours_of_all(scan_of(tmp_path, features), 3, seed=1, device=CPU)
    expected_cosine, expected = brute_force(features, 3)
    assert (index.numpy() == expected).mean() > 0.9
    assert not (index.numpy() == np.arange(1500)[:, None]).any()
    assert (cosine.numpy() <= expected_cosine + 1e-6).all()


def test_unreadable_images_are_nobodys_neighbours(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(50, 5))
    scan = scan_of(tmp_path, features, bad=(7, 20))
    _, index = neighbours_of_all(scan, 3, seed=1, device=CPU)
    kept = np.delete(np.arange(50), [7, 20])
    assert (scan.readable() == kept).all()
    assert (index.numpy() == brute_force(features[kept], 3)[1]).all()
    _, positions = nearest_to(scan, torch.from_numpy(features[[7]]).float(), 48)
    assert sorted(positions[0].tolist()) == kept.tolist()


def test_fewer_images_than_neighbours(tmp_path: Path) -> None:
    cosine, index = neighbours_of_all(scan_of(tmp_path, np.eye(3)), 5, seed=1, device=CPU)
    assert cosine.shape == (3, 2) and (index >= 0).all()
    cosine, _ = neighbours_of_all(scan_of(tmp_path / "one", np.ones((1, 3))), 5, seed=1, device=CPU)
    assert cosine.shape == (1, 0)


def test_duplicates_are_the_planted_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    features, grey = rng.normal(size=(200, 8)), rng.integers(0, 256, size=(200, 256)).astype(np.uint8)
    for copy, original in ((50, 3), (120, 3), (199, 10)):
        features[copy] = features[original] + 0.001 * rng.normal(size=8)
        grey[copy] = np.clip(grey[original].astype(int) + rng.integers(-4, 5, size=256), 0, 255)
    features[77] = features[78] + 0.001  # neighbours that do not look alike
    scan = scan_of(tmp_path, features, grey)
    _, index = neighbours_of_all(scan, 5, seed=1, device=CPU)
    found = duplicates(scan, index, 0.98)
    assert [group.tolist() for group in found.groups] == [[3, 50, 120], [10, 199]]
    expected = np.corrcoef(grey[10], grey[199])[0, 1]
    assert found.similarity[1] == pytest.approx([expected, expected], abs=1e-4)


def test_blank_images_are_duplicates_of_the_same_grey_only(tmp_path: Path) -> None:
    grey = np.repeat(np.array([[10], [10], [200], [90]], np.uint8), 256, axis=1)
    grey[3, :128] = 30
    scan = scan_of(tmp_path, np.ones((4, 3)) + 0.001 * np.eye(4)[:, :3], grey)
    _, index = neighbours_of_all(scan, 3, seed=1, device=CPU)
    assert [group.tolist() for group in duplicates(scan, index, 0.98).groups] == [[0, 1]]


def test_outliers_are_the_planted_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    features = np.r_[np.eye(10)[rng.integers(4, size=300)] + 0.05 * rng.normal(size=(300, 10)), np.eye(10)[[8, 9]]]
    scan = scan_of(tmp_path, features)
    cosine, _ = neighbours_of_all(scan, 5, seed=1, device=CPU)
    found = outliers(scan, cosine, 3.0)
    assert set(found.positions_O.tolist()) == {300, 301}
    expected = (1 - brute_force(features, 5)[0]).mean(1)
    low, high = np.percentile(expected, [25, 75])
    assert found.threshold == pytest.approx(high + 3 * (high - low), abs=1e-6)
    assert found.distance_O == pytest.approx(np.sort(expected[[300, 301]])[::-1], abs=1e-6)


def test_nearest_to_pictures_is_a_brute_force_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterssl.labelling.clusters.BLOCK_BYTES", 100 * 6 * 4)
    rng = np.random.default_rng(2)
    features, queries = rng.normal(size=(730, 6)), rng.normal(size=(3, 6))
    cosine, positions = nearest_to(scan_of(tmp_path, features), torch.from_numpy(queries).float(), 9)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    order = np.argsort(-expected, axis=1)[:, :9]
    assert (positions == order).all()
    np.testing.assert_allclose(cosine.numpy(), np.take_along_axis(expected, order, 1), atol=1e-6)
