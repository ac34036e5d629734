"""Named mixtures of faults, so that a published number says which faults it was measured with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from abft.injection.fault import Fault


@dataclass(frozen=True)
class Mixture:
    """Faults with probabilities. ``name`` identifies it; any change of its numbers needs a new name."""

    name: str
    parts: tuple[tuple[float, Fault], ...]

    def draw(self, rng: np.random.Generator) -> Fault:
        p = np.array([share for share, _ in self.parts])
        return self.parts[int(rng.choice(len(p), p=p / p.sum()))][1]

    @staticmethod
    def gpu_2026() -> Mixture:
        """50 % nullification, 48 % flips (most of them multi-bit, low bits favoured), 1 % non-finite, 1 % carry; warp-aligned.

        After the gate-level study of GPUs arXiv 2605.04213, with V-ABFT's production logs (arXiv 2602.08043) for the carries;
        the split over patterns is ours: 30 % single elements, 35 % warp strides, 20 % fragments, 10 % rows, 5 % tiles.
        """
        patterns = ((0.30, "element"), (0.35, "warp"), (0.20, "fragment"), (0.10, "row"), (0.05, "tile"))
        kinds = (
            (0.50, Fault("nullify", role="*")),
            (0.18, Fault("bitflip", role="*", bits=1, weighting="lsb")),
            (0.18, Fault("bitflip", role="*", bits=2, weighting="lsb")),
            (0.12, Fault("bitflip", role="*", bits=4, weighting="lsb")),
            (0.01, Fault("nonfinite", role="*")),
            (0.01, Fault("carry", role="*")),
        )
        places = ((0.8, "accumulator"), (0.2, "operand"))
        parts = []
        for kind_share, fault in kinds:
            for pattern_share, pattern in patterns:
                for place_share, place in places:
                    parts.append((kind_share * pattern_share * place_share, fault.replace(pattern=pattern, where=place)))
        return Mixture("gpu_2026", tuple(parts))
