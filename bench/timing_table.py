"""Timing records as a text table, a block for each case."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEAD = (
    f"{'':<26}{'median':>10}{'p20':>10}{'p80':>10}  {'× torch':>8}  {'95 %':<15}{'× twin':>8}{'error':>9}{'floor':>9}  {'found':<9}"
    f"{'panels':>9}"
)


def of(title: str, rows: Iterable[dict[str, Any]]) -> str:
    return "\n".join([f"\n{title}", HEAD, *map(_line, rows)])


def _line(r: dict[str, Any]) -> str:
    times = "".join(f"{duration(float(r[name])):>10}" for name in ("seconds", "p20", "p80"))
    interval = f"{float(r['low']):.3f} … {float(r['high']):.3f}"
    twin = f"{float(r['over_twin']['ratio']):.3f}" if "over_twin" in r else "–"
    floor = "–" if r["expected_floor"] is None else f"{float(r['expected_floor']):.1e}"
    found = f"{r['found']}/{r['harmful']}" if r.get("trials") else "–"
    held = f"{r['panel_bytes'] / 2**20:.2f} MB"
    price = f"  {r['per_billion_tokens']:.2f} per 1e9 tokens" if "per_billion_tokens" in r else ""
    ratio = f"  {float(r['ratio']):>8.3f}  {interval:<15}{twin:>8}{float(r['error']):>9.1e}{floor:>9}  {found:<9}{held:>9}"
    return f"  {r['provider']:<24}{times}{ratio}{price}"


def duration(seconds: float) -> str:
    """Three digits and a unit: 63.2 µs."""
    scale, unit = next((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (0.0, "µs")) if seconds >= scale)
    value = seconds / (scale or 1e-6)
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"
