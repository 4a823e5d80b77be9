"""The nearest centroids by one GPU kernel: scores live and die in registers, no rows x centroids block is written.

A program holds a tile of rows, walks over the centroids tile by tile, and keeps for each row the best so far, as
attention kernels keep a running maximum. Products are three TensorFloat-32 products each, which is float32 to its last
bits or so; scores are computed again by the caller. Triton's interpreter runs the same code on a CPU.

Shape suffixes: N rows, K centroids, D dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CENTROIDS, DIMENSIONS = 128, 128, 16
"""of a tile; larger ones do not fit into the registers of Hopper GPUs"""


@triton.jit
def _search(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    x_ND, c_KD, offset_K, label_N, N, K,
    D: tl.constexpr, OFFSETS: tl.constexpr, ROWS: tl.constexpr, CENTROIDS: tl.constexpr, DIMENSIONS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    best_n = tl.full((ROWS,), float("-inf"), tl.float32)
    label_n = tl.zeros((ROWS,), tl.int32)
    for first in range(0, K, CENTROIDS):
        k = first + tl.arange(0, CENTROIDS)
        score_nk = tl.zeros((ROWS, CENTROIDS), tl.float32)
        for start in range(0, D, DIMENSIONS):
            d = start + tl.arange(0, DIMENSIONS)
            x_nd = tl.load(x_ND + n[:, None] * D + d[None, :], (n[:, None] < N) & (d[None, :] < D), 0.0)
            c_dk = tl.load(c_KD + k[None, :] * D + d[:, None], (k[None, :] < K) & (d[:, None] < D), 0.0)
            score_nk += tl.dot(x_nd, c_dk, input_precision="tf32x3")
        if OFFSETS:
            score_nk -= tl.load(offset_K + k, k < K, 0.0)[None, :]
        score_nk = tl.where(k[None, :] < K, score_nk, float("-inf"))
        high_n, where_n = tl.max(score_nk, 1, return_indices=True)
        better_n = high_n > best_n  # of equal scores the first stays
        best_n = tl.where(better_n, high_n, best_n)
        label_n = tl.where(better_n, first + where_n, label_n)
    tl.store(label_N + n, label_n.to(tl.int64), n < N)


def nearest_by_kernel(x_ND: Tensor, centroids_KD: Tensor, offset_K: Tensor | None) -> Tensor:
    """Of each row the centroid of the highest x . c - offset, of equal ones the first: int64 [N].

    Args:
        x_ND: float32, on a GPU (anywhere under Triton's interpreter).
        centroids_KD: the same.
        offset_K: the same; None for zeros.
    """
    x_ND, centroids_KD = x_ND.contiguous(), centroids_KD.contiguous()
    label_N = x_ND.new_empty(len(x_ND), dtype=torch.int64)
    if len(x_ND):
        _search[(triton.cdiv(len(x_ND), ROWS),)](
            x_ND, centroids_KD, centroids_KD if offset_K is None else offset_K, label_N, *x_ND.shape[:1],
            *centroids_KD.shape, offset_K is not None, ROWS, CENTROIDS, DIMENSIONS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return label_N
