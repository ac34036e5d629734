"""Bytes that panels cost, per direction, relative to the weights; and that nothing else is kept.

    python -m bench memory

``panels``: checksum and sketch columns. ``fingerprints``: the integer sums that name a changed element. The kernel's panels
(operand type, 16 columns a group) are computed from their layout; the reference's are counted from what abft really holds.
"""

from __future__ import annotations

import argparse
import gc

import torch
from torch import nn

import abft
from abft import floating, panels
from abft.checksum import FULL, Groups, Layout
from bench.clean import DTYPES
from bench.results import Results

SHAPES = ((512, 512), (4096, 4096), (1536, 384), (11008, 4096))
GROUP = 512


#: Numbers of a panel column that share one sum of bits (abft.triton_kernels.configs.PANEL).
BLOCK = 64


def of_layout(n: int, k: int, dtype: torch.dtype) -> tuple[float, float]:
    """The kernel's panel, columns of the operand type; and its integers: the panel's own sums of bits, and three sums (int32) for each
    half of W's patterns per group and k."""
    layout = Layout(Groups.near_equal(n, GROUP, unit=128), FULL, dtype, floating.PARTS[dtype])
    scales = 4 * layout.columns if layout.scaled else 0
    fingerprints = 6 * layout.groups.count * dtype.itemsize * k
    integers = fingerprints + 4 * layout.columns * -(-k // BLOCK) + 8 * layout.groups.count
    weight = n * k * dtype.itemsize
    return (layout.columns * k * dtype.itemsize + scales) / weight, integers / weight


def of_reference(n: int, k: int, dtype: torch.dtype, group: int | None) -> dict[str, float]:
    """What a protected layer really remembers after a forward and a backward."""
    layer = abft.protect(nn.Linear(k, n, bias=False, dtype=dtype), abft.Policy(group=group))  # type: ignore[arg-type]
    keys, buffers, parameters = list(layer.state_dict()), len(list(layer.buffers())), len(list(layer.parameters()))
    sizes = []
    for backward in (False, True):
        with torch.set_grad_enabled(backward):
            y = layer(torch.ones(4, k, dtype=dtype, requires_grad=backward))
            if backward:
                y.float().sum().backward()
        entries = panels.panels_of(layer.weight).entries.values()
        sizes.append((sum(e.panel.nbytes for e in entries), sum(panels.fingerprint_bytes(e) for e in entries)))
    layer.weight.grad = None
    total = layer.weight.nbytes
    assert (keys, buffers, parameters) == (["weight"], 0, 1), "the module holds more than its weight"
    (forward, named), (both, named_both) = sizes
    return {
        "forward_panels": forward / total,
        "backward_panels": (both - forward) / total,
        "forward_fingerprints": named / total,
        "backward_fingerprints": (named_both - named) / total,
    }


def steps(count: int) -> dict[str, int]:
    """Live bytes of panels over optimizer steps: they must not grow."""
    gc.collect()
    before = panels.live_bytes()
    model = abft.protect(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        seen.append(panels.live_bytes() - before)
    del model, optimizer
    gc.collect()
    return {"steps": count, "first": seen[0], "last": seen[-1], "largest": max(seen), "after_deletion": panels.live_bytes() - before}


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench memory", description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    results = Results("memory", fresh=True)
    for name in ("fp32", "bf16", "fp16"):
        for n, k in SHAPES:
            found = of_reference(n, k, DTYPES[name], GROUP)
            default = of_reference(n, k, DTYPES[name], None)
            panel, integers = of_layout(n, k, DTYPES[name])
            r = results.add(
                "memory", dtype=name, n=n, k=k, group=GROUP, kernel_panel=panel, kernel_fingerprints=integers, **found,
                default_group_forward_panels=default["forward_panels"], default_group_backward_panels=default["backward_panels"],
            )  # fmt: skip
            print({key: value for key, value in r.items() if key != "kind"})
    print(results.add("steps", **steps(100)))
    return 0
