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
    """from one node to another"""
    per_node: int = 1
    """ranks of a node"""
    local_latency_us: float = 0.0
    """from one rank to the next within a node"""

    def seconds(self, message: Message, ranks: int) -> float:
        """Of one collective by itself, with nothing else on the links.

        A ring carries each byte of an all-reduce twice over every link, but for 1/n of them, and passes a node's link
        once, however many ranks the node has. Small messages go from rank to rank within a node and along a tree over
        the nodes, as NCCL sends them, an all-reduce up and down again.
        """
        n = message.ranks or ranks
        if n < 2:
            return 0.0
        local = min(self.per_node, n)
        hops_us = (local - 1) * self.local_latency_us + math.ceil(math.log2(n / local)) * self.latency_us
        passes = 2 if message.kind == "all-reduce" else 1
        factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "broadcast": 1.0}[message.kind]
        return 8e-9 * factor * message.nbytes / self.bandwidth_gbps + 1e-6 * passes * hops_us


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
    waited: bool = True
    """whether the step waits for it; otherwise it travels while the step goes on"""


def shares(messages: Iterable[Message], ranks: int, network: Network) -> list[Share]:
    """Messages of one step by what they are for, the longest first."""
    found: dict[tuple[str, str, bool], Share] = {}
    for message in messages:
        label, own = LABELS.get(message.part, message.part), message.part not in SHARED
        share = found.setdefault(
            (label, message.kind, message.waited), Share(label, message.kind, own=own, waited=message.waited)
        )
        share.calls += 1
        share.nbytes += message.nbytes
        share.seconds += network.seconds(message, ranks)
    return sorted(found.values(), key=lambda share: -share.seconds)
