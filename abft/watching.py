"""``watch``: outputs of modules that no checksum covers, compared with their envelopes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abft.calibration import Calibration
from abft.nn.checked import Checked
from abft.statistics import envelope, watches
from abft.statistics.envelope import Envelope

#: Samples from which a module's envelope is learnt, where no calibration brings it.
WARM_UP = 64
#: Measured outputs on a device that wait to be read; older ones are judged first.
MOST_WAITING = 256
#: The model's own output, among its modules.
OUTPUT = "(output)"


class watch:
    """``with abft.watch(model) as watcher:`` — every n-th output of the modules that no checksum covers is measured, and compared
    with what is usual: its mean, rms, maximum and share of NaN and Inf.

    Watched by default: modules without children that are not linear (norms, activation functions, embeddings, …) and the model's own
    output (logits, or a loss). ``observe`` takes anything else, such as a gradient norm. Functions called without a module are not
    seen. filter_fn(module, fqn): True = watch, instead of the default.
    calibration: envelopes learnt before (``abft.calibrate``; it must be of this model, else CalibrationError); without one they
    are learnt from the first 64 samples of each module, which are trusted. every: of how many calls one is measured.
    false_alarm: probability that a clean sample of one measure leaves its range, as far as the logarithms of measures are normal.

    What leaves its envelope is an ``Alarm`` in ``abft.report()``, never a repair, and no reason for quarantine: new data look the same.
    On a GPU nothing waits: measures are judged when ``check`` is called, at exit, or when 256 of them wait.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration | None = None,
        *,
        every: int = 16,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        false_alarm: float = envelope.FALSE_ALARM,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"watch needs a torch.nn.Module; got {type(model).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive whole number of calls; got {every!r}")
        if not 0 < false_alarm < 1:
            raise ValueError(f"false_alarm must lie between 0 and 1; got {false_alarm!r}")
        if calibration is not None:
            calibration.check(model)
        self._every, self._p = every, false_alarm
        self.envelopes: dict[str, Envelope] = dict(calibration.envelopes) if calibration is not None else {}
        self.samples: dict[str, list[np.ndarray]] = {}
        self._calls: dict[str, int] = {}
        self._told: dict[tuple[str, str], int] = {}
        self._waiting: list[tuple[str, Tensor]] = []
        self._learning = True
        chosen = filter_fn or _has_no_checksum
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in _watched(model, chosen)]

    def observe(self, name: str, value: Tensor | float) -> None:
        """Measure a value that is no module's output: a loss, a gradient norm. Every call counts."""
        self._measure(name, value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu"))

    def check(self) -> None:
        """Judge what waits on a device; waits for it."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            for (name, _), measures in zip(waiting, torch.stack([m for _, m in waiting]).cpu().numpy(), strict=True):
                self._judge(name, measures)

    def remove(self) -> None:
        """Stop watching."""
        self.check()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def measured(module: nn.Module, inputs: Any, output: Any) -> None:
            calls = self._calls[name] = self._calls.get(name, -1) + 1
            if calls % self._every == 0:
                for i, tensor in enumerate(_tensors(output)):
                    self._measure(name if i == 0 else f"{name}[{i}]", tensor)

        return measured

    def _measure(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return  # an expert without tokens says nothing
        measures = envelope.measure(tensor)
        if measures.device.type == "cpu":
            self._judge(name, measures.numpy())
            return
        self._waiting.append((name, measures))
        if len(self._waiting) >= MOST_WAITING:
            self.check()

    def _judge(self, name: str, measures: np.ndarray) -> None:
        known = self.envelopes.get(name)
        if known is None:
            taken = self.samples.setdefault(name, [])
            taken.append(np.array(measures))
            # More where they depend on each other.
            if self._learning and len(taken) >= WARM_UP and len(taken) % WARM_UP == 0:
                learnt = envelope.learn(np.array(taken), self._p)
                if learnt is not None:
                    self.envelopes[name] = learnt
            return
        seen = self._calls.get(name, 0)
        for which, deviation in known.outside(measures):
            if seen >= self._told.get((name, which), 0):
                self._told[name, which] = 2 * seen + 1
                value = measures[envelope.MEASURES.index(which)]
                meaning = f"{which} {value:.4g} lies {abs(deviation):.3g} half-widths from the middle of its usual range"
                watches.raise_alarm(name, "output", "envelope", deviation, False, known.samples, meaning=meaning)


def _has_no_checksum(module: nn.Module, name: str) -> bool:
    return not any(True for _ in module.children()) and not isinstance(module, Checked | nn.Linear | nn.Dropout | nn.Identity)


def _watched(model: nn.Module, chosen: Callable[[nn.Module, str], bool]) -> Iterator[tuple[str, nn.Module]]:
    yield OUTPUT, model
    for name, module in model.named_modules():
        if name and chosen(module, name):
            yield name, module


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and not output.is_meta:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
