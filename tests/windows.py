"""What a report's ``worst`` must be over windows that overlap, wherever the ledger lies."""

from __future__ import annotations

from torch import Tensor, nn

import abft


def check_worst(layer: nn.Module, easy: Tensor, hard: Tensor) -> None:
    """A maximum has no difference: each window must keep its own. Of ``easy`` rows every residual is zero, of ``hard`` ones not."""
    layer(hard)
    first = abft.report(reset=True).worst
    assert first > 0 == abft.report().worst
    layer(easy)
    assert abft.report().worst == 0
    with abft.protected() as outer:
        layer(hard)
        with abft.protected() as inner:
            layer(easy)
            assert inner.report().worst == 0
            assert outer.report().worst == first
        layer(hard)
        assert inner.report().worst == first  # its window is open
    assert abft.report().worst == first
