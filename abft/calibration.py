"""``Calibration``: what is normal for one model on one kind of device, as a text file that people can read and compare."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from abft import events
from abft.errors import CalibrationError
from abft.statistics import watches
from abft.statistics.baseline import Baseline
from abft.statistics.envelope import Envelope
from abft.statistics.watches import Name

FORMAT, VERSION = "abft calibration", 1
_KEYS = ("site", "role", "columns", "depth", "dtype")
_ARRAYS = ("sigma", "soft", "mean", "mean_deviation", "noise", "noise_deviation")


@dataclass(frozen=True)
class Calibration:
    """σ̂ of every site, the envelopes of outputs, and where they come from.

    provenance: model (class), fingerprint (of parameters' names and shapes), dtype, device, versions, time, labels of
    ``abft.context``. sites: per (site, role, N, K, dtype) the frozen baseline, residuals seen, and kappa: by what factor the bound
    should be raised so that no clean residual passes half of it (1 where none did; a recommendation, which nothing applies).
    envelopes: per module. incomplete: sites with too few rows for a baseline. ``hash`` names it on events.
    """

    provenance: dict[str, Any]
    sites: dict[Name, dict[str, Any]] = field(default_factory=dict)
    envelopes: dict[str, Envelope] = field(default_factory=dict)
    incomplete: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of what it says; when it was made is no part of them."""
        said = self.to_dict()
        said["provenance"] = {k: v for k, v in said["provenance"].items() if k != "time"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, model: nn.Module) -> None:
        """Raise CalibrationError unless it was made from this model, in this dtype, on this kind of device."""
        here = identity(model)
        for what in ("fingerprint", "dtype", "device"):
            if self.provenance[what] != here[what]:
                raise CalibrationError(
                    f"this calibration was made of a model of {_words(self.provenance)}; this one is {_words(here)}: their {what} differs "
                    f"({self.provenance[what]} against {here[what]}). Calibrate anew: abft.calibrate(model, batches)"
                )

    def apply(self, model: nn.Module) -> Calibration:
        """From now on its baselines are normal for this process's sites, without a warm-up, and events carry its hash. Returns itself.

        Give it to ``abft.watch``, too, for its envelopes. Raises CalibrationError for another model, dtype or device.
        """
        self.check(model)
        watches.know({name: _baseline(values) for name, values in self.sites.items()})
        events.calibration = self.hash
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, "provenance": self.provenance,
            "sites": [dict(zip(_KEYS, name, strict=True)) | self.sites[name] for name in sorted(self.sites)],
            "envelopes": {name: asdict(e) | {"low": list(e.low), "high": list(e.high)} for name, e in sorted(self.envelopes.items())},
            "incomplete": list(self.incomplete),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Raises CalibrationError for anything that is not a calibration of this version."""
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise CalibrationError(
                f"expected a file of {FORMAT!r}, version {VERSION}; got {values.get('format')!r}, version {values.get('version')!r}. "
                "Calibrate anew: abft.calibrate(model, batches)"
            )
        try:
            sites = {tuple(s[k] for k in _KEYS): {k: v for k, v in s.items() if k not in _KEYS} for s in values["sites"]}
            envelopes = {name: Envelope(tuple(e["low"]), tuple(e["high"]), e["samples"], e["p"]) for name, e in values["envelopes"].items()}
            return cls(dict(values["provenance"]), sites, envelopes, tuple(values["incomplete"]))  # type: ignore[arg-type]
        except (KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"this calibration lacks {error}: it was cut short or edited. Calibrate anew, or roll back") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; what was there before is kept beside it as NAME.previous (``python -m abft calibrate --rollback``)."""
        target = Path(path)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        fresh = target.with_name(target.name + ".new")
        fresh.write_text(text, encoding="utf-8")
        if target.exists():
            os.replace(target, previous(target))
        os.replace(fresh, target)  # whole or not at all
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what ``save`` wrote. Raises CalibrationError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationError(f"no calibration can be read from {path}: {error}") from None
        if not isinstance(values, dict):
            raise CalibrationError(f"no calibration can be read from {path}: expected an object, got {type(values).__name__}")
        return cls.from_dict(values)

    def compare(self, other: Calibration) -> str:
        """What changed from this one to the other, as a table; sites whose σ̂ moved by more than a tenth first."""
        lines = [f"{self.hash} ({self.provenance.get('time', '')}) → {other.hash} ({other.provenance.get('time', '')})"]
        lines += [
            f"{key}: {self.provenance.get(key)} → {other.provenance.get(key)}"
            for key in sorted({*self.provenance, *other.provenance} - {"time"})
            if self.provenance.get(key) != other.provenance.get(key)
        ]
        rows = []
        for name in sorted({*self.sites, *other.sites}):
            label = f"{name[0]} ({name[1]}, N={name[2]}, K={name[3]}, {name[4]})"
            if name not in self.sites or name not in other.sites:
                rows.append((np.inf, f"{label}: only in the {'second' if name in other.sites else 'first'}"))
                continue
            a, b = self.sites[name], other.sites[name]
            ratio, moved = b["sigma"][0] / a["sigma"][0], (b["mean"][0] - a["mean"][0]) / a["sigma"][0]
            mark = " *" if abs(ratio - 1) > 0.1 or abs(moved) > 0.1 else ""
            rows.append((max(abs(np.log(ratio)), abs(moved)), f"{label}: σ × {ratio:.3f}, mean {moved:+.3f} σ{mark}"))
        lines += [text for _, text in sorted(rows, key=lambda row: -row[0])]
        for output in sorted({*self.envelopes, *other.envelopes}):
            if output not in self.envelopes or output not in other.envelopes:
                lines.append(f"envelope of {output}: only in the {'second' if output in other.envelopes else 'first'}")
            elif shifted := _apart(self.envelopes[output], other.envelopes[output]):
                lines.append(f"envelope of {output}: {', '.join(shifted)} apart")
        return "\n".join(lines)


def _apart(a: Envelope, b: Envelope) -> list[str]:
    """Measures whose middles lie outside of each other's ranges."""
    from abft.statistics.envelope import MEASURES

    def beyond(x: Envelope, y: Envelope, i: int) -> bool:
        return not x.low[i] <= (y.low[i] + y.high[i]) / 2 <= x.high[i]

    return [name for i, name in enumerate(MEASURES) if beyond(a, b, i) and beyond(b, a, i)]


def previous(path: Path) -> Path:
    """Where ``save`` keeps what was there before."""
    return path.with_name(path.name + ".previous")


def rollback(path: str | os.PathLike[str]) -> Calibration:
    """Exchange a file with the one before it; returns what is in force now. Raises CalibrationError if there is none."""
    target = Path(path)
    back = previous(target)
    restored = Calibration.load(back)
    aside = target.with_name(target.name + ".new")
    if target.exists():
        os.replace(target, aside)
    os.replace(back, target)
    if aside.exists():
        os.replace(aside, back)
    return restored


def identity(model: nn.Module) -> dict[str, str]:
    """What a calibration belongs to: the parameters' names and shapes, their dtype, their kind of device."""
    named = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtypes = sorted({str(p.dtype)[6:] for p in model.parameters()})
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
    return {"model": _class_of(model), "fingerprint": digest, "dtype": ", ".join(dtypes), "device": kind}


def _class_of(model: nn.Module) -> str:
    return str(getattr(type(model), "_abft_base", type(model)).__name__)


def _words(provenance: Mapping[str, Any]) -> str:
    return f"{provenance['model']} in {provenance['dtype']} on {provenance['device']}"


def of_baseline(baseline: Baseline, residuals: float, most: float) -> dict[str, Any]:
    """A frozen baseline as plain values."""
    values: dict[str, Any] = {name: [_plain(v) for v in getattr(baseline, name)] for name in _ARRAYS}
    rates, kappa = [list(r) for r in baseline.rates], max(1.0, 2.0 * most)
    said = {"rates": rates, "size": baseline.size, "residuals": int(residuals), "most": most, "kappa": kappa}
    return values | said | ({} if baseline.alone else {"units": baseline.units, "together": _plain(baseline.together)})


def _plain(value: float) -> float | str:
    return float(value) if np.isfinite(value) else "inf"  # JSON has no infinity


def _baseline(values: Mapping[str, Any]) -> Baseline:
    baseline = Baseline(values.get("units", 1), rates=tuple((a, b) for a, b in values["rates"]), size=values["size"], frozen=True)
    for name in _ARRAYS:
        setattr(baseline, name, np.array([float(v) for v in values[name]]))
    baseline.together = float(values.get("together", "inf"))  # unknown: that test says nothing
    return baseline
