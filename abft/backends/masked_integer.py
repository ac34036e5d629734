"""int8 products on a device the host must not wait for, without kernels of our own: every branch is a mask.

As masked.py: under level "correct" the product is always computed a second time, and suspect rows take the second result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abft import digits
from abft.backends import integer, masked
from abft.backends.call import Call
from abft.checksum import Sums
from abft.ledger import Verdict

#: A bound that no whole number but zero keeps, by which zero can be divided, and which is zero in a record (fp32).
NONE = 2.0**-200


def product(call: Call, words: Tensor, site: Tensor, backend: str) -> Tensor:
    """The product, judged and repaired without a host decision; counts and one record go into ``words``."""
    if call.policy.level == "off" or call.role not in call.policy.roles:
        return integer.execute(call, call.strikes)
    panel = integer.panel_of(call, integer.plan_for(call))
    for strike in call.strikes:
        if strike.place == "panel":
            strike.hit(panel.columns)
    y = integer.execute(call, call.strikes)
    residual, _ = integer.sums(y, call.a, panel, call.strikes)
    bad = (residual != 0).any(-1).any(-1)
    if call.policy.level == "detect":
        verdicts = {Verdict.OBSERVED: bad}
    else:
        again = integer.execute(call)
        still = (integer.sums(again, call.a, panel)[0] != 0).any(-1).any(-1)
        verdicts = {Verdict.RECOMPUTED: bad & ~still, Verdict.UNCORRECTED: bad & still}
        y = torch.where(bad.unsqueeze(-1), again, y)
    seen = residual.to(torch.float64)
    zero = torch.zeros_like(seen)
    sums = Sums(digits.FORMS[call.policy.panel].kinds, seen, zero, zero[..., 0], zero[..., 0])
    masked.write(words, site, call, backend, sums, zero + NONE, verdicts)
    return y
