"""The kernel exp(sharpness * logits + potentials) of all images, in blocks: what an optimal transport iterates on.

The matrix of N images and K clusters is never held unless it fits a stated budget; it is made anew in every pass from
features and head weights. Row factors cancel in a transport plan, so each row is divided by its largest entry: nothing
overflows, and what would underflow is too small to count.

Shape suffixes: N images of this rank, n images of a block, D features, K clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.cluster.cores import MOST, on_cores
from clusterssl.cluster.nearest import first_largest
from clusterssl.errors import UserError

_BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""entries of a block: on a CPU what stays in the cache of a core"""
_DRIFT = {torch.float32: 60.0, torch.float64: 600.0}
"""spread of potentials against those in the kernel up to which their exponentials are factors of it"""

_LEAST = {torch.float32: -85.0, torch.float64: -700.0}
"""exponents below count as these: their exponentials would be denormal, which processors compute very slowly"""


class Kernel:
    """Blocks of exp(sharpness * logits + reference - largest of the row), of this rank's images.

    Potentials (logarithms of the column factors) are float64 [K] on the CPU, the same on every rank.
    """

    def __init__(
        self,
        features_ND: Tensor,
        weight_KD: Tensor | None = None,
        bias_K: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        cache_bytes: float = 0.0,
    ) -> None:
        """Nothing is computed yet.

        Args:
            features_ND: of this rank's images, any float type; ranks may hold different numbers, or none. They may lie
                on the CPU while the weights, and with them the work, are on a GPU.
            weight_KD: logits are features_ND @ weight_KD.T + bias_K; None: the features are the logits, K = D.
            bias_K: None for zeros.
            dtype: float32 or float64, of blocks and their sums; sums over blocks are float64.
            cache_bytes: the kernel is kept between passes if this rank's part of it is no larger; on a CPU also if it
                is no larger than the features, from which it would take long to make anew.

        Raises:
            UserError: features or weights are not finite; fewer images than clusters.
        """
        self.features_ND, self.dtype = features_ND.detach(), dtype
        self.weight_KD, self.bias_K = (None if x is None else x.detach() for x in (weight_KD, bias_K))
        self.device = features_ND.device if weight_KD is None else weight_KD.device
        self.images = int(dist.all_reduce_(torch.tensor(len(features_ND))))
        self.clusters = features_ND.shape[1] if weight_KD is None else len(weight_KD)
        self._check()
        held = features_ND.nbytes if self.device.type == "cpu" and weight_KD is not None else 0
        kept = len(features_ND) * self.clusters * torch.finfo(dtype).bits // 8 <= max(cache_bytes, held)
        self._kept_NK = self._empty(len(features_ND), self.clusters) if kept else None
        self.sharpness = 0.0
        self.passes = 0

    def in_double(self) -> Kernel:
        """The same in float64, without keeping anything; its passes go on from these."""
        exact = Kernel(self.features_ND, self.weight_KD, self.bias_K, dtype=torch.float64)
        exact.passes = self.passes
        return exact

    def _check(self) -> None:
        if self.images < self.clusters:
            raise UserError(
                f"{self.clusters} clusters of {self.images} images: equal clusters need at least one image each; "
                "ask for fewer clusters"
            )
        parts = [part for part in (*self.features_ND.split(2**16), self.weight_KD, self.bias_K) if part is not None]
        finite = all(bool(torch.isfinite(torch.stack(part.aminmax())).all()) for part in parts if part.numel())
        if int(dist.all_reduce_(torch.tensor(int(finite)), "min")) == 0:
            raise UserError("features or head weights are not finite: training has diverged; lower the learning rate")

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def tilt(self, sharpness: float, reference_K: Tensor) -> None:
        """Set the kernel to exp(sharpness * logits + reference_K), rows divided by their largest entries."""
        self.sharpness, self.reference_K = sharpness, reference_K.clone()
        if self._kept_NK is not None:
            kept_NK = self._kept_NK

            def keep(span: slice, _: Tensor) -> None:
                self._fill(span, kept_NK[span])

            self._on_blocks(keep)

    def sums(self, work: Callable[[slice, Tensor], Tensor], length: int) -> Tensor:
        """One pass over all images, and one all-reduce of R numbers.

        Args:
            work: from the rows of a block and its entries [n, K], which it may not change, to R numbers; it may be
                called in several threads at once.
            length: R.

        Returns:
            Sums over the blocks of all ranks, float64 [R] on the device, the same on every rank.
        """
        self.passes += 1
        kept_NK = self._kept_NK
        whole_R = self._on_blocks(
            lambda span, room_nK: work(span, self._fill(span, room_nK) if kept_NK is None else kept_NK[span]), length
        )
        return dist.all_reduce_(whole_R)

    def _on_blocks(self, work: Callable[[slice, Tensor], Tensor | None], length: int = 0) -> Tensor:
        """Sum over this rank's blocks of what `work` makes of their rows and room [n, K]; on a CPU by all its cores."""
        rows = max(1, _BLOCK[self.device.type] // self.clusters)

        def share(start: int, stop: int) -> Tensor:
            sums_R = torch.zeros(length, dtype=torch.float64, device=self.device)
            room_nK = self._empty(min(rows, stop - start), self.clusters)
            for first in range(start, stop, rows):
                span = slice(first, min(first + rows, stop))
                found = work(span, room_nK[: span.stop - first])
                sums_R += 0 if found is None else found
            return sums_R

        with _full_precision(self.device):
            images = len(self.features_ND)
            return torch.stack(on_cores(share, images) if self.device.type == "cpu" else [share(0, images)]).sum(0)

    def _fill(self, span: slice, out_nK: Tensor) -> Tensor:
        self._exponents(span, self.reference_K, out_nK)
        return out_nK.sub_(out_nK.amax(1, keepdim=True)).clamp_(min=_LEAST[self.dtype]).exp_()

    def _exponents(self, span: slice, potentials_K: Tensor, out_nK: Tensor) -> Tensor:
        """sharpness * logits + potentials_K of a block."""
        sharpness = self.sharpness
        x_nD, shift_K = self.features_ND[span].to(self.device).to(self.dtype), potentials_K.to(self.device)
        if self.weight_KD is None:
            return torch.add(shift_K.to(x_nD), x_nD, alpha=sharpness, out=out_nK)
        if self.bias_K is not None:
            shift_K = shift_K + sharpness * self.bias_K.double()
        return torch.addmm(shift_K.to(x_nD), x_nD, self.weight_KD.to(x_nD).T, alpha=sharpness, out=out_nK)

    def in_reach(self, potentials_K: Tensor) -> bool:
        """Whether exponentials of the difference to the reference are safe factors of the kernel."""
        drift_K = potentials_K - self.reference_K
        return float(drift_K.max() - drift_K.min()) <= _DRIFT[self.dtype]

    @torch.no_grad()
    def shares(self, potentials_K: Tensor) -> Tensor:
        """Share of the images that each cluster gets when every image is spread by its row of the tilted kernel.

        One pass, and one all-reduce of K numbers.

        Returns:
            float64 [K] on the CPU, summing to 1; the same on every rank.
        """
        if not self.in_reach(potentials_K):
            self.tilt(self.sharpness, potentials_K)
        drift_K = potentials_K - self.reference_K
        drift_K -= (drift_K.max() + drift_K.min()) / 2
        factor_K = drift_K.exp().to(self.device, self.dtype)
        sums_K = self.sums(lambda _, kernel_nK: kernel_nK.T @ (kernel_nK @ factor_K).reciprocal_(), self.clusters)
        return (sums_K * factor_K).cpu() / self.images

    @torch.no_grad()
    def labels(self, potentials_K: Tensor) -> Tensor:
        """The largest entry of each row of the tilted kernel, the first of equal ones: int64 [N]."""
        labels_N = torch.empty(len(self.features_ND), dtype=torch.int64, device=self.device)

        def label(span: slice, room_nK: Tensor) -> None:
            labels_N[span] = first_largest(self._exponents(span, potentials_K, room_nK))

        self._on_blocks(label)
        return labels_N

    @torch.no_grad()
    def largest(self, potentials_K: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """The largest entries of each row of the plan: clusters int64 [N, J], and weights [N, J] that sum to 1."""
        clusters_NJ = torch.empty(len(self.features_ND), kept, dtype=torch.int64, device=self.device)
        weights_NJ = self._empty(len(self.features_ND), kept)

        def keep(span: slice, room_nK: Tensor) -> None:
            top_nJ, clusters_NJ[span] = self._exponents(span, potentials_K, room_nK).topk(kept)
            weights_NJ[span] = top_nJ.softmax(1)

        if kept:
            self._on_blocks(keep)
        return clusters_NJ, weights_NJ

    @torch.no_grad()
    def second_best(self, potentials_K: Tensor, labels_N: Tensor, allowed_K: Tensor) -> tuple[Tensor, Tensor]:
        """Best of the allowed clusters for each row, int64 [N], and how far its exponent is below that of the label."""
        others_N, losses_N = torch.empty_like(labels_N), self._empty(len(labels_N))
        closed_K = torch.where(allowed_K, 0.0, -torch.inf).to(self.device, self.dtype)

        def compare(span: slice, room_nK: Tensor) -> None:
            exponents_nK = self._exponents(span, potentials_K, room_nK)
            own_n = exponents_nK.gather(1, labels_N[span, None])[:, 0]
            best_n, others_N[span] = exponents_nK.add_(closed_K).max(1)
            losses_N[span] = own_n - best_n

        self._on_blocks(compare)
        return others_N, losses_N


def kernel_bytes(images: int, clusters: int, cache_bytes: float, number_bytes: int) -> int:
    """Bytes that a `Kernel` takes on a CPU beside its features: a block for each core, and what is kept."""
    whole = images * clusters * number_bytes
    blocks = 2 * MOST * max(_BLOCK["cpu"], clusters) * number_bytes
    return min(blocks, 2 * whole) + (whole if whole <= cache_bytes else 0)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32: logits are multiplied by the sharpness before they are exponents."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
