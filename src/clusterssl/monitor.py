"""Is it learning? Numbers that tell a collapsing run from a healthy one while it runs, and a verdict in words.

Shape suffixes: N embeddings of this rank, D their dimension, B images, K prototypes.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clusterssl import dist

logger = logging.getLogger(__name__)


class Observation(NamedTuple):
    """What a method shows of one step, detached: embeddings, raw scores and assignments of the assigned crops."""

    z_ND: Tensor
    scores_NK: Tensor
    assignments_NK: Tensor | None
    """None where images have a label each, instead of a distribution over prototypes"""
    ln_k: float | None = None
    """loss of guessing, where it is not the logarithm of the prototypes: the mean over heads of different size"""


def rankme(z_ND: Tensor) -> float:
    """Effective rank of the embeddings of all ranks: exp of the entropy of their normalised singular values.

    RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1). Between 1 (one direction) and min(N, D).
    """
    gram_DD = dist.all_reduce_(z_ND.double().T @ z_ND.double()).cpu()
    singular_D = torch.linalg.eigvalsh(gram_DD).clamp_(min=0).sqrt_()
    share_D = singular_D / singular_D.sum().clamp_(min=1e-300) + 1e-7
    return math.exp(float(-(share_D * share_D.log()).sum()))


def feature_std(z_ND: Tensor) -> float:
    """Mean standard deviation of the embedding's coordinates, times sqrt(D): 1 when spread evenly, 0 when collapsed."""
    z_ND = z_ND.double()
    packed = torch.cat([z_ND.sum(0), z_ND.square().sum(0), z_ND.new_tensor([z_ND.shape[0]])])
    packed = dist.all_reduce_(packed)
    dim = z_ND.shape[1]
    mean_D, square_D = packed[:dim] / packed[-1], packed[dim:-1] / packed[-1]
    return float((square_D - mean_D.square()).clamp_(min=0).sqrt().mean() * math.sqrt(dim))


def entropy(assignments_NK: Tensor) -> float:
    """Mean entropy of the rows over all ranks, in nats: ln K when nothing is assigned, 0 when everything is sharp."""
    q_NK = assignments_NK.float()
    rows_N = torch.special.entr(q_NK).sum(1)
    packed = dist.all_reduce_(torch.stack([rows_N.sum(), rows_N.new_tensor(float(rows_N.numel()))]).double())
    return float(packed[0] / packed[1])


class Occupancy:
    """Counts the nearest prototype of every embedding since the last reset, on the device."""

    def __init__(self) -> None:
        self._counts_K: Tensor | None = None
        self._carried_K: Tensor | None = None

    @torch.no_grad()
    def add(self, scores_NK: Tensor) -> None:
        """Count the rows' best prototypes; the raw scores are counted because assignments are balanced by force."""
        nearest_N, number = scores_NK.argmax(1), scores_NK.shape[1]
        if self._counts_K is None or len(self._counts_K) != number:  # other clusters may be of another number
            self._counts_K = torch.zeros(number, dtype=torch.int64, device=scores_NK.device)
            if self._carried_K is not None and len(self._carried_K) != number:
                self._carried_K = None
        self._counts_K.scatter_add_(0, nearest_N, torch.ones_like(nearest_N))

    def total(self) -> Tensor | None:
        """Counts [K] over all ranks, int64 on the CPU; None before the first `add`."""
        if self._counts_K is None:
            return self._carried_K
        counted_K = dist.all_reduce_(self._counts_K.clone()).cpu()
        return counted_K if self._carried_K is None else counted_K + self._carried_K

    def carry(self, counts_K: Tensor) -> None:
        """Add counts [K] over all ranks from before an interruption."""
        self._carried_K = counts_K

    def reset(self) -> None:
        """Begin to count anew."""
        self._carried_K = None
        if self._counts_K is not None:
            self._counts_K.zero_()


def perplexity(counts_K: Tensor) -> float:
    """Effective number of prototypes in use: exp of the entropy of the counts."""
    share_K = counts_K.double() / counts_K.sum().clamp_(min=1)
    return math.exp(float(torch.special.entr(share_K).sum()))


class Monitor:
    """Computes the health numbers at logged steps and names a collapse once.

    A run is called collapsed when, at `patience` logged steps in a row and over at least `least_steps` steps, its loss
    sits at ln K, the loss of guessing, and the embeddings are (nearly) one direction, or the assignments say (nearly)
    nothing or ever less than at the first logged step, and do not get any sharper. Untrained networks begin at an
    entropy of about 0.85 ln K with epsilon 0.05 and 0.67 ln K with 0.03; learning lowers it, collapsing raises it. A
    loss that begins above ln K passes it on its way down within few steps, hence `least_steps`.
    """

    def __init__(self, remedies: str = "", *, patience: int = 3, least_steps: int = 20) -> None:
        self.remedies, self.patience, self.least_steps = remedies, patience, least_steps
        self.verdict = ""
        self._suspect = 0
        self._suspect_steps = 0
        self._first_suspected = 0.0
        self._untrained: float | None = None
        self._window = Occupancy()
        self._epoch = Occupancy()

    def observe(self, seen: Observation) -> None:
        """Every step: count prototypes."""
        self._suspect_steps += 1
        self._window.add(seen.scores_NK)
        self._epoch.add(seen.scores_NK)

    def measure(self, loss: float, seen: Observation) -> dict[str, float]:
        """At a logged step: the numbers for metrics.jsonl; a collective call. May set and log `verdict`."""
        counts_K = self._window.total()
        assert counts_K is not None, "measure follows observe"
        ln_k = math.log(counts_K.numel())
        numbers = {
            "ln_k": ln_k if seen.ln_k is None else seen.ln_k,
            "entropy": 0.0 if seen.assignments_NK is None else entropy(seen.assignments_NK),
            "perplexity": perplexity(counts_K),
            "dead_share": float((counts_K == 0).double().mean()),
            "feature_std": feature_std(seen.z_ND),
            "rankme": rankme(seen.z_ND),
        }
        self._window.reset()
        self._judge(loss, numbers, ln_k)
        return numbers

    def epoch_occupancy(self) -> list[int]:
        """Counts per prototype of the epoch that ends, over all ranks; begins the next."""
        counts_K = self._epoch.total()
        self._epoch.reset()
        return [] if counts_K is None else counts_K.tolist()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from; a collective call."""
        counts_K = self._epoch.total()
        return {
            "verdict": self.verdict,
            "suspect": self._suspect,
            "suspect_steps": self._suspect_steps,
            "first_suspected": self._first_suspected,
            "untrained": self._untrained,
            "occupancy": [] if counts_K is None else counts_K.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.verdict, self._suspect = state["verdict"], state["suspect"]
        self._suspect_steps = state.get("suspect_steps", self.least_steps)  # of a checkpoint that does not say it
        self._first_suspected, self._untrained = state["first_suspected"], state["untrained"]
        if state["occupancy"]:
            self._epoch.carry(torch.tensor(state["occupancy"]))

    def _judge(self, loss: float, numbers: dict[str, float], ln_k: float) -> None:
        if self._untrained is None:
            self._untrained = numbers["entropy"]
        evidence = _evidence(loss, numbers, self._untrained, ln_k)
        recovering = self._suspect > 0 and numbers["entropy"] < self._first_suspected - 0.01 * ln_k
        if not evidence or recovering:
            self._suspect = 0
        if evidence and self._suspect == 0:
            self._first_suspected, self._suspect_steps = numbers["entropy"], 0
        self._suspect += bool(evidence)
        if self._suspect < self.patience or self._suspect_steps < self.least_steps or self.verdict:
            return
        self.verdict = f"collapse: {evidence}. {self.remedies}".strip()
        if dist.rank() == 0:  # all ranks see the same
            logger.warning("%s", self.verdict)


def _evidence(loss: float, numbers: dict[str, float], untrained: float, ln_k: float) -> str:
    """What speaks for a collapse at this step, in words; empty when nothing does. `ln_k` is of the entropy's head."""
    guessing = numbers["ln_k"]
    mean, there = ("", "") if math.isclose(guessing, ln_k) else (", the mean over the heads", "in one head ")
    found = []
    if numbers["feature_std"] < 0.1:
        found.append(f"embeddings are nearly equal (standard deviation {numbers['feature_std']:.3f} of 1)")
    if numbers["rankme"] < 1.5:
        found.append(f"embeddings span {numbers['rankme']:.1f} directions")
    now = numbers["entropy"]
    if now > 0.95 * ln_k:
        found.append(there + f"assignments are nearly uniform (entropy {now:.2f} of ln K = {ln_k:.2f})")
    elif now > max(0.88 * ln_k, untrained + 0.04 * ln_k):
        found.append(there + f"assignments grow uniform (entropy {untrained:.2f} -> {now:.2f}, ln K = {ln_k:.2f})")
    stuck = abs(loss - guessing) < 0.02 * guessing
    return f"loss {loss:.3f} at ln K = {guessing:.3f}{mean}, " + ", ".join(found) if found and stuck else ""
