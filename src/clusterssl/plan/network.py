"""Time that collectives take at a stated bandwidth and latency, and what they are for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from clusterssl.plan.watch import Message

LABELS = {
    "gradients": "gradients",
    "batchnorm": "SyncBatchNorm",
    "sinkhorn": "Sinkhorn",
    "online": "Sinkhorn",
    "two_softmax": "softmax over the batch",
    "neighbour_queue": "embeddings for the queue",
    "offline": "count of labelled images",
    "transport_labels": "count of labelled images",
    "main_deepcluster": "gradients of the top layer",
}
SHARED = ("gradients", "main_deepcluster", "batchnorm", "buffers of the network", "agreement to go on")
"""parts that any training with these networks has; all others are the method's own"""


@dataclass(frozen=True)
class Network:
    """What connects the ranks."""

    bandwidth_gbps: float
    """of a node's link to the others in 10^9 bits/s, or on one node of a rank's to its neighbour"""
    latency_us: float
    """of one message"""

    def seconds(self, message: Message, ranks: int) -> float:
        """Of one collective by itself, with nothing else on the links.

        A ring carries each byte of an all-reduce twice over every link, but for 1/n of them, and passes a node's link
        once, however many ranks the node has; the steps that cannot be avoided grow with the logarithm of the ranks.
        """
        n = message.ranks or ranks
        if n < 2:
            return 0.0
        hops = math.ceil(math.log2(n)) * (2 if message.kind == "all-reduce" else 1)
        factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "broadcast": 1.0}[message.kind]
        return 8e-9 * factor * message.nbytes / self.bandwidth_gbps + 1e-6 * hops * self.latency_us


@dataclass
class Share:
    """Of a step's communication."""

    label: str
    kind: str
    calls: int = 0
    nbytes: int = 0
    """of one rank's contributions"""
    seconds: float = 0.0
    own: bool = False
    """the method's, not that of data-parallel training as such"""


def shares(messages: Iterable[Message], ranks: int, network: Network) -> list[Share]:
    """Messages of one step by what they are for, the longest first."""
    found: dict[tuple[str, str], Share] = {}
    for message in messages:
        key = (LABELS.get(message.part, message.part), message.kind)
        share = found.setdefault(key, Share(*key, own=message.part not in SHARED))
        share.calls += 1
        share.nbytes += message.nbytes
        share.seconds += network.seconds(message, ranks)
    return sorted(found.values(), key=lambda share: -share.seconds)
