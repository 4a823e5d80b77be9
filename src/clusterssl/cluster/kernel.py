"""The kernel exp(sharpness * logits + potentials) of all images, in blocks: what an optimal transport iterates on.

The matrix of N images and K clusters is never held unless it fits a stated budget; it is made anew in every pass from
features and head weights. Row factors cancel in a transport plan, so each row is divided by its largest entry: nothing
overflows, and what underflows is too small to count.

Shape suffixes: N images of this rank, n images of a block, D features, K clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from clusterssl import dist
from clusterssl.errors import UserError

_BLOCK = {"cpu": 2**20, "cuda": 2**26}
"""entries of a block: on a CPU what stays in its cache"""
_DRIFT = {torch.float32: 60.0, torch.float64: 600.0}
"""spread of potentials against those in the kernel up to which their exponentials are factors of it"""


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
            features_ND: of this rank's images, any float type; ranks may hold different numbers, or none.
            weight_KD: logits are features_ND @ weight_KD.T + bias_K; None: the features are the logits, K = D.
            bias_K: None for zeros.
            dtype: float32 or float64, of blocks and their sums; sums over blocks are float64.
            cache_bytes: the kernel is kept between passes if this rank's part of it is no larger.

        Raises:
            UserError: features or weights are not finite; fewer images than clusters.
        """
        self.features_ND, self.weight_KD, self.bias_K, self.dtype = features_ND, weight_KD, bias_K, dtype
        self.device = features_ND.device
        self.images = int(dist.all_reduce_(torch.tensor(len(features_ND))))
        self.clusters = features_ND.shape[1] if weight_KD is None else len(weight_KD)
        self._check()
        rows = max(1, _BLOCK[self.device.type] // self.clusters)
        self.spans = [slice(first, first + rows) for first in range(0, len(features_ND), rows)]
        entries = len(features_ND) * self.clusters
        cached = entries * torch.finfo(dtype).bits // 8 <= cache_bytes
        self._cache = (
            torch.empty((len(features_ND), self.clusters), dtype=dtype, device=self.device) if cached else None
        )
        self._scratch = torch.empty((min(rows, len(features_ND)), self.clusters), dtype=dtype, device=self.device)
        self.sharpness = 0.0
        self.passes = 0

    def _check(self) -> None:
        if self.images < self.clusters:
            raise UserError(
                f"{self.clusters} clusters of {self.images} images: equal clusters need at least one image each; "
                "ask for fewer clusters"
            )
        parts = [part for part in (*self.features_ND.split(2**16), self.weight_KD, self.bias_K) if part is not None]
        finite = all(bool(torch.isfinite(part).all()) for part in parts)
        if int(dist.all_reduce_(torch.tensor(int(finite)), "min")) == 0:
            raise UserError("features or head weights are not finite: training has diverged; lower the learning rate")

    def tilt(self, sharpness: float, reference_K: Tensor) -> None:
        """Set the kernel to exp(sharpness * logits + reference_K), rows divided by their largest entries."""
        self.sharpness, self.reference_K = sharpness, reference_K.clone()
        if self._cache is not None:
            for span in self.spans:
                self._filled(span, self._cache[span])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """One pass: rows and entries [n, K] of each block, valid until the next one; not to be changed."""
        self.passes += 1
        for span in self.spans:
            yield span, self._cache[span] if self._cache is not None else self._filled(span, self._out(span))

    def _out(self, span: slice) -> Tensor:
        return self._scratch[: len(self.features_ND[span])]

    def _filled(self, span: slice, out_nK: Tensor) -> Tensor:
        self._exponents(span, self.reference_K, out_nK)
        return out_nK.sub_(out_nK.amax(1, keepdim=True)).exp_()

    def _exponents(self, span: slice, potentials_K: Tensor, out_nK: Tensor, sharpness: float | None = None) -> Tensor:
        """sharpness * logits + potentials_K of a block."""
        sharpness = self.sharpness if sharpness is None else sharpness
        x_nD = self.features_ND[span].to(self.dtype)
        if self.weight_KD is None:
            return torch.add(potentials_K.to(x_nD), x_nD, alpha=sharpness, out=out_nK)
        shift_K = potentials_K.to(self.device)
        if self.bias_K is not None:
            shift_K = shift_K + sharpness * self.bias_K.double()
        weight_DK = self.weight_KD.to(self.dtype).T
        with _full_precision():
            return torch.addmm(shift_K.to(x_nD), x_nD, weight_DK, alpha=sharpness, out=out_nK)

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
        sums_K = torch.zeros(self.clusters, dtype=torch.float64, device=self.device)
        for _, kernel_nK in self.blocks():
            sums_K += kernel_nK.T @ (kernel_nK @ factor_K).reciprocal_()
        sums_K *= factor_K
        return dist.all_reduce_(sums_K).cpu() / self.images

    @torch.no_grad()
    def labels(self, potentials_K: Tensor) -> Tensor:
        """The largest entry of each row of the tilted kernel, the first of equal ones: int64 [N]."""
        labels_N = torch.empty(len(self.features_ND), dtype=torch.int64, device=self.device)
        for span in self.spans:
            torch.argmax(self._exponents(span, potentials_K, self._out(span)), 1, out=labels_N[span])
        return labels_N

    @torch.no_grad()
    def second_best(self, potentials_K: Tensor, labels_N: Tensor, allowed_K: Tensor) -> tuple[Tensor, Tensor]:
        """Best of the allowed clusters for each row, int64 [N], and how far its exponent is below that of the label."""
        others_N, losses_N = (
            torch.empty_like(labels_N),
            torch.empty(labels_N.shape, dtype=self.dtype, device=self.device),
        )
        closed_K = torch.zeros(self.clusters, dtype=self.dtype, device=self.device)
        closed_K[~allowed_K.to(self.device)] = -torch.inf
        for span in self.spans:
            exponents_nK = self._exponents(span, potentials_K, self._out(span))
            own_n = exponents_nK.gather(1, labels_N[span, None])[:, 0]
            best_n, others_N[span] = exponents_nK.add_(closed_K).max(1)
            losses_N[span] = own_n - best_n
        return others_N, losses_N

    @torch.no_grad()
    def cross_entropy(self, labels_N: Tensor) -> float:
        """Mean over all images of -log softmax(logits) at their labels, what SeLa reports as its cost."""
        nothing_K, total = torch.zeros(self.clusters, dtype=torch.float64), 0.0
        for span in self.spans:
            logits_nK = self._exponents(span, nothing_K, self._out(span), sharpness=1.0)
            own_n = logits_nK.gather(1, labels_N[span, None])[:, 0]
            total += float((logits_nK.logsumexp(1) - own_n).double().sum())
        return float(dist.all_reduce_(torch.tensor(total, dtype=torch.float64))) / self.images


def kernel_bytes(images: int, clusters: int, cache_bytes: float, number_bytes: int, device: str = "cpu") -> int:
    """Bytes that a `Kernel` takes beside its features: the block in work, its like in scratch, and what is kept."""
    whole = images * clusters * number_bytes
    return 2 * min(_BLOCK[device] * number_bytes, whole) + (whole if whole <= cache_bytes else 0)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products of float32 in float32: logits are multiplied by the sharpness before they are exponents."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
