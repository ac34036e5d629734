"""dK and dV, products whose rows are keys, added up over the blocks of queries that see them.

Every part is judged alone. The total's rows are compared with what the parts should sum to, within the sum of their bounds;
its columns with 1ᵀ dV = Σ_i (Σ_t P_it) dO_i and 1ᵀ dK = Σ_i (Σ_t dS_it) Q_i, which no panel has a part in.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from abft import checksum, threshold
from abft.attention import products
from abft.attention.problem import Plane, Tile
from abft.attention.products import Multiplied
from abft.attention.softmax import UNIT
from abft.attention.tally import Tally
from abft.backends.reference import Judgement
from abft.checksum import Groups, Kind
from abft.ledger import Verdict

ARITHMETIC = {torch.float32: threshold.FMA_32, torch.float64: threshold.FMA_64}


class KeySum:
    """Σ over tiles of dK or dV: ``total`` (heads, keys, columns), and the sums it must have."""

    def __init__(self, name: str, plane: Plane, shape: torch.Size, dtype: torch.dtype) -> None:
        self.name, self.plane = name, plane
        self.total = torch.zeros(shape, dtype=dtype)
        self._columns = torch.zeros(shape[0], shape[2], dtype=dtype)  # 1ᵀ total, as it must be
        self._reach = torch.zeros_like(self._columns)  # Σ |…| of what is added up there
        self._predicted: np.ndarray | None = None
        self._tau: np.ndarray | None = None
        self._kinds: tuple[Kind, ...] = ()
        self._groups = Groups(1, 1)

    def add(self, tally: Tally, part: Multiplied, tile: Tile, *, row_sums: Tensor, sizes: Tensor, right: Tensor) -> None:
        """Add a tile's part aᵀ · right. row_sums, sizes: Σ_t and Σ_t |…| of the left operand a (heads, rows)."""
        y, j = products.judge(tally, part, tile.key_of)
        place = self.total[:, tile.keys]
        place += y
        ours = tuple(hit for hit in part.call.strikes if hit.place == self.name)
        if ours:
            clean = place.clone()
            for hit in ours:
                hit.hit(place)
            tally.struck_by(ours, clean, place)
        if j is not None:
            self._columns += torch.bmm(row_sums.unsqueeze(-2), right).squeeze(-2)
            self._reach += torch.bmm(sizes.unsqueeze(-2), right.abs()).squeeze(-2)
            self._expect(part, tile, j)

    def _expect(self, part: Multiplied, tile: Tile, j: Judgement) -> None:
        heads, keys = self.total.shape[:2]
        if self._predicted is None or self._tau is None:
            self._predicted = np.zeros((heads, keys, *j.tau.shape[1:]), j.tau.dtype)
            self._tau, self._kinds = np.zeros_like(self._predicted), j.sums.kinds
            self._groups = products.plan_for(part.call, self.name).layout.groups
        shape = (heads, -1, *j.tau.shape[1:])
        self._predicted[:, tile.keys] += j.sums.predicted.reshape(shape)
        self._tau[:, tile.keys] += j.tau.reshape(shape)

    @property
    def is_wrong(self) -> bool:
        return len(self.wrong[0]) > 0

    @cached_property
    def wrong(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys over all heads whose rows are not what the parts say, residuals, bounds); of a head whose columns alone say so, its first.

        Read when the total is complete.
        """
        if self._predicted is None or self._tau is None:
            return np.empty(0, np.int64), np.empty(0), np.empty(0)
        with np.errstate(all="ignore"):
            rows = self._wrong_rows(self._predicted, self._tau)
            columns = self._wrong_columns(set((rows[0] // self.total.shape[1]).tolist()))
        return tuple(np.concatenate(pair) for pair in zip(rows, columns, strict=True))  # type: ignore[return-value]

    def _wrong_rows(self, predicted: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, ...]:
        actual = checksum.actual_sums(self.total, self._groups, self._kinds, self.total.dtype)[0].numpy()
        residual = np.abs(actual - predicted)
        # What was not finite in a part was said of that part.
        wrong = ~(residual <= tau) & np.isfinite(predicted) & np.isfinite(tau)
        return _worst(residual, tau, wrong, keys=actual.shape[0] * actual.shape[1])

    def _wrong_columns(self, known: set[int]) -> tuple[np.ndarray, ...]:
        depth = self.plane.problem.q.shape[2] * self.plane.problem.q.shape[3]
        keys = self.total.shape[1]
        dtype = self.total.dtype
        kappa = threshold.kappa(ARITHMETIC[dtype], depth + keys, "one", softmax_operand=True)
        bound = (self._reach * (kappa * UNIT[dtype]) + torch.finfo(dtype).tiny).numpy()
        residual = (self.total.sum(1) - self._columns).abs().numpy()
        wrong = ~(residual <= bound) & np.isfinite(self._columns.numpy()) & np.isfinite(bound)
        wrong[list(known)] = False
        heads, found, limits = _worst(residual, bound, wrong, keys=len(residual))
        return heads * keys, found, limits


def _worst(residual: np.ndarray, bound: np.ndarray, wrong: np.ndarray, keys: int) -> tuple[np.ndarray, ...]:
    """(rows with something wrong, the worst residual of each, its bound) of arrays with ``keys`` rows."""
    residual, bound, wrong = (a.reshape(keys, -1) for a in (residual, bound, wrong))
    rows = np.flatnonzero(wrong.any(-1))
    at = np.where(wrong, np.nan_to_num(residual / bound, nan=np.inf), -1.0)[rows].argmax(-1) if len(rows) else rows
    return rows, residual[rows, at], bound[rows, at]


def decide(tally: Tally, first: KeySum, second: KeySum) -> None:
    """Say what became of the keys whose sums were wrong, the plane having been computed again; or not, where second is first."""
    rows, residual, bound = first.wrong
    if len(rows) == 0:
        return
    if second is first:
        _find(tally, first, tally.only_told, np.ones(len(rows), bool))
        return
    tally.outcome(first.name).executions += 1
    still = np.isin(rows, second.wrong[0])
    _find(tally, first, Verdict.RECOMPUTED, ~still, "transient")
    # Added up twice to the same, of parts that were all judged: the sums are not such that the bound holds for them.
    same = (first.total == second.total).all(-1).reshape(-1).numpy()[rows]
    _find(tally, first, Verdict.FALSE_ALARM, still & same)
    _find(tally, first, Verdict.UNCORRECTED, still & ~same)


def _find(tally: Tally, of: KeySum, verdict: Verdict, which: np.ndarray, cause: str = "unknown") -> None:
    rows, residual, bound = (a[which] for a in of.wrong)
    if len(rows):
        with np.errstate(all="ignore"):
            worst = int(np.nan_to_num(residual / bound, nan=np.inf).argmax())
        tally.find(of.name, verdict, len(rows), of.plane.key_of(int(rows[worst])), float(residual[worst]), float(bound[worst]), cause)

