"""Whether anybody could tell that something did not go through an operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled

_PLAIN = (Tensor, torch.nn.Parameter)


def nobody_watches(*operands: Tensor) -> bool:
    """On a CPU, of plain tensors, outside of modes, transforms, tracers, profilers: there an operator costs as much as a small product."""
    for t in operands:
        if not (type(t) in _PLAIN and t.is_cpu and torch._C._has_storage(t)) or t._is_zerotensor() or t.is_neg():
            return False
    return (
        torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and not _profiler_enabled()
    )
