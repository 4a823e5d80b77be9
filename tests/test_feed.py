"""Passes over all images: what they give, on any number of ranks, and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

from clusterssl import dist, pulse
from clusterssl.cluster.kmeans import KMeansOptions, euclidean_kmeans
from clusterssl.cluster.neighbours import nearest_neighbours
from clusterssl.cluster.transport import TransportOptions, transport
from clusterssl.data import Augment, BadImages, Loader, MultiCrop, open_source
from clusterssl.dist import World
from clusterssl.errors import Stopped, UserError
from clusterssl.feed import Feed
from clusterssl.precision import Precision
from clusterssl.preemption import StopRequest
from tests.ranks import run_ranks


def feed_of(world: World, data_path: str = "synthetic:37:20x20", batch: int = 12, accumulate: int = 1) -> Feed:
    source = open_source(data_path)
    loader = Loader(
        source, MultiCrop((2, 1), (16, 12), (0.4, 0.2), (1.0, 0.5)), batch_size=batch // world.size // accumulate,
        accumulate=accumulate, rank=world.rank, world_size=world.size, seed=3,
    )  # fmt: skip
    ledger = BadImages(source, max_bad_fraction=0.1)
    return Feed(loader, Augment(), world, torch.contiguous_format, Precision(), ledger)


def passes(rank: int, world_size: int) -> tuple[list[tuple[list[Tensor], Tensor]], list[tuple[Tensor, Tensor]]]:
    feed = feed_of(World(rank, world_size))
    return list(feed.augmented(2)), list(feed.plain(5))


def test_two_ranks_share_what_one_sees() -> None:
    (alone_shuffled, alone_plain), parts = passes(0, 1), run_ranks(passes, 2)
    assert len(alone_shuffled) == 3
    for step, (crops, index) in enumerate(alone_shuffled):
        assert torch.equal(index, torch.cat([part[0][step][1] for part in parts]))
        for view, crop in enumerate(crops):
            torch.testing.assert_close(torch.cat([part[0][step][0][view] for part in parts]), crop)
    images = [torch.cat([batch for batch, _ in found]) for found in (alone_plain, parts[0][1] + parts[1][1])]
    torch.testing.assert_close(images[0], images[1])
    assert torch.equal(torch.cat([index for part in parts for _, index in part[1]]), torch.arange(37))


def test_a_pass_equals_the_epoch_and_may_run_inside_another() -> None:
    feed = feed_of(World(), accumulate=2)
    epoch: Iterator = feed.loader.epoch(2)
    first = next(epoch)
    inside = list(feed.augmented(2))
    rest = list(epoch)
    batches = [batch for step in [first, *rest] for batch in step]
    assert len(inside) == len(batches) == 6
    for (crops, index), batch in zip(inside, batches, strict=True):
        assert torch.equal(index, batch.index)
        assert all(torch.equal(a, b) for a, b in zip(crops, feed.crops(batch), strict=True))


@pytest.mark.parametrize("kind", ["augmented", "plain"])
def test_a_signal_ends_a_pass(kind: str) -> None:
    feed = feed_of(World())
    with StopRequest() as feed.request:
        batches = feed.augmented(0) if kind == "augmented" else feed.plain(4)
        next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM between two steps"):
            list(batches)


def signalled(rank: int, world_size: int) -> tuple[str, int]:
    """One rank is asked to stop; both end after the same batch."""
    feed, seen = feed_of(World(rank, world_size), "synthetic:120:20x20"), 0
    try:
        for _ in feed.augmented(0):
            seen += 1
            dist.barrier()  # as a synchronised forward pass would
            if rank == 1 and seen == 3:
                feed.request.received = "SIGUSR1"
    except Stopped as stopped:
        return str(stopped), seen
    return "", seen


def test_a_signal_to_one_rank_ends_the_pass_on_all() -> None:
    (first, seen), (second, also_seen) = run_ranks(signalled, 2)
    assert "signal to another rank" in first and "SIGUSR1" in second
    assert seen == also_seen < 10


def clustering(rank: int, world_size: int) -> tuple[str, int]:
    """One rank is asked to stop in the third iteration of a k-means of very many."""
    feed, heeded = feed_of(World(rank, world_size)), 0

    def heed() -> None:
        nonlocal heeded
        heeded += 1
        if rank == 1 and heeded == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        feed.heed()

    x_ND = torch.randn(50, 4, generator=torch.Generator().manual_seed(rank))
    with StopRequest() as feed.request, pulse.listening(heed):
        try:
            euclidean_kmeans(x_ND, 5, KMeansOptions(kmeans_iters=1000))
        except Stopped as stopped:
            return str(stopped), heeded
    return "", heeded


def test_a_signal_to_one_rank_ends_a_clustering_on_all() -> None:
    (first, heeded), (second, also_heeded) = run_ranks(clustering, 2)
    assert "signal to another rank" in first and "SIGUSR1" in second
    assert heeded == also_heeded == 3


@pytest.mark.parametrize("solver", ["quasi-newton", "published"])
def test_a_signal_ends_a_transport(solver: Literal["quasi-newton", "published"]) -> None:
    feed = feed_of(World())
    feed.request.received = "SIGTERM"
    logits_NK = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    with pulse.listening(feed.heed), pytest.raises(Stopped, match="SIGTERM"):
        transport(logits_NK, sharpness=25.0, options=TransportOptions(sinkhorn_solver=solver))


def test_a_signal_ends_a_search_for_neighbours() -> None:
    feed = feed_of(World())
    feed.request.received = "SIGTERM"
    with pulse.listening(feed.heed), pytest.raises(Stopped, match="SIGTERM"):
        nearest_neighbours(torch.randn(20, 3), 2)


def unreadable(rank: int, world_size: int, folder: str) -> str:
    feed = feed_of(World(rank, world_size), folder, batch=4)
    try:
        for _ in feed.plain(2):
            pass
    except UserError as error:
        return str(error)
    return ""


def test_too_many_unreadable_images_end_the_pass_on_all_ranks(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (24, 24), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    for number in (13, 15, 17):  # the second rank's
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    first, second = run_ranks(unreadable, 2, str(tmp_path))
    assert "another rank stopped" in first and "3 of 20 images cannot be read" in second


def test_an_unreadable_start_ends_the_pass_on_all_ranks(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (24, 24), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    for number in range(10, 20):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    first, second = run_ranks(unreadable, 2, str(tmp_path))
    assert "another rank stopped" in first and "cannot be read" in second
