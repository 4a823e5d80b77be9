"""The three passes of Sinkhorn-Knopp as GPU kernels that read every score once a pass.

A program takes every P-th row: the row is in registers while its sum with u is formed and while it is added to the sums
of the prototypes, of which each program keeps its own and writes them once, so that no order of arrival changes a bit.
Three iterations read or write the matrix six times; operations one by one do so fourteen times. The number of launches
does not depend on the number of rows. Triton's interpreter runs the same code on a CPU.

Shape suffixes: A problems, N rows, K prototypes, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PROTOTYPES = 2**14
"""a row has to fit into the registers of a program"""
_PROGRAMS, _ROWS_EACH = 264, 4
"""two a multiprocessor of an H200 for each problem, and few enough that their sums are little beside the scores"""
_TINY = torch.finfo(torch.float32).tiny


@triton.jit
def _start(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    score_ANK, plan_ANK, part_APK, N, shift, scale, P, K: tl.constexpr, COLUMNS: tl.constexpr
):
    p, a, k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
    sum_K = tl.zeros((COLUMNS,), tl.float32)
    for n in range(p, N, P):
        at_K = (a * N + n) * K + k
        plan_K = tl.exp2((tl.load(score_ANK + at_K, k < K, float("-inf")) - shift) * scale)
        tl.store(plan_ANK + at_K, plan_K, k < K)
        sum_K += plan_K
    tl.store(part_APK + (a * P + p) * K + k, sum_K, k < K)


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    plan_ANK, u_AK, part_APK, N, tiny, P, K: tl.constexpr, COLUMNS: tl.constexpr
):
    p, a, k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
    u_K = tl.load(u_AK + a * K + k, k < K, 0.0)
    sum_K = tl.zeros((COLUMNS,), tl.float32)
    for n in range(p, N, P):
        plan_K = tl.load(plan_ANK + (a * N + n) * K + k, k < K, 0.0)
        sum_K += plan_K * (1.0 / tl.maximum(tl.sum(plan_K * u_K, 0), tiny))
    tl.store(part_APK + (a * P + p) * K + k, sum_K, k < K)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    plan_ANK, u_AK, N, tiny, P, K: tl.constexpr, COLUMNS: tl.constexpr
):
    p, a, k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, COLUMNS)
    u_K = tl.load(u_AK + a * K + k, k < K, 0.0)
    for n in range(p, N, P):
        at_K = (a * N + n) * K + k
        plan_K = tl.load(plan_ANK + at_K, k < K, 0.0) * u_K
        tl.store(plan_ANK + at_K, plan_K * (1.0 / tl.maximum(tl.sum(plan_K, 0), tiny)), k < K)


class ByKernels:
    """The passes over scores [A, N, K], float32 on a GPU; see `sinkhorn.ByOperations`."""

    def __init__(self, plan_ANK: Tensor) -> None:
        self.plan_ANK = plan_ANK
        problems, self.rows, self.prototypes = plan_ANK.shape
        self.programs = max(1, min(triton.cdiv(self.rows, _ROWS_EACH), _PROGRAMS))
        self._grid = (self.programs, problems)
        self._part_APK = plan_ANK.new_empty(problems, self.programs, self.prototypes)
        columns = triton.next_power_of_2(self.prototypes)
        self._words = {"K": self.prototypes, "COLUMNS": columns, "num_warps": 8, "enable_fp_fusion": True}

    def start(self, scores_ANK: Tensor, shift: float, scale: float) -> Tensor:
        """plan = 2^((scores - shift) scale), and its sums over this rank's rows [A, K]."""
        _start[self._grid](
            scores_ANK, self.plan_ANK, self._part_APK, self.rows, shift, scale, self.programs, **self._words,
        )  # fmt: skip
        return self._part_APK.sum(1)

    def sweep(self, u_AK: Tensor) -> Tensor:
        """Sums [A, K] over rows of which each, times u, sums to 1."""
        _sweep[self._grid](self.plan_ANK, u_AK, self._part_APK, self.rows, _TINY, self.programs, **self._words)
        return self._part_APK.sum(1)

    def finish(self, u_AK: Tensor) -> None:
        """The plan's columns times u, and its rows to the sum 1."""
        _finish[self._grid](self.plan_ANK, u_AK, self.rows, _TINY, self.programs, **self._words)
