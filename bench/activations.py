"""A real model's activations and gradients, fault-free: the sentence encoder all-MiniLM-L6-v2 on the standard library's docstrings.

    python -m bench activations --rows 1e6

Every product of its layers goes through abft, forward and backward; what must not happen is an alarm. The model comes from
the package that the demo uses; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

import abft
from bench import intervals
from bench.results import Results

BATCH = 24


def loss_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Contrastive: each text's first half of the tokens against the second halves of all others."""
    position = mask.cumsum(1)
    half = mask.sum(1, keepdim=True) // 2
    first, second = (_pool(hidden, mask * m) for m in (position <= half, position > half))
    return nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))


def _pool(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench activations", description=__doc__)
    parser.add_argument("--rows", type=float, default=1e6)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: by autocast")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        from demo import corpus, encoder

        model = encoder.load()
    except ImportError as error:
        print(f"the demo cannot be imported: {error}", file=sys.stderr)
        return 1
    except encoder.EncoderUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    results = Results(f"clean-minilm-{options.dtype}", fresh=options.fresh, rows=options.rows)
    texts = [p.text for p in corpus.passages()]
    abft.protect(model.model, abft.Policy(on_uncorrected="record"))
    optimizer = torch.optim.SGD(model.model.parameters(), lr=1e-3)
    abft.report(reset=True)
    rows, step = sum(r["rows"] for r in results.records if r["kind"] == "steps"), 0
    while rows < options.rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bf16"):
            for _ in range(8):
                start = step * BATCH % (len(texts) - BATCH)
                tokens = model.tokenise(texts[start : start + BATCH])
                loss_of(model.model(**tokens).last_hidden_state, tokens["attention_mask"]).backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        r = abft.report(reset=True)
        counted = ("detected", "false_alarms", "stale", "input_rows", "overflow_rows")
        alarms = {name: getattr(r, name) for name in counted if getattr(r, name)}
        roughest = sorted(((s.worst, name) for name, s in r.sites.items()), reverse=True)[:3]
        rows += r.checks
        results.add("steps", rows=r.checks, products=r.products, alarms=alarms, worst=r.worst, roughest=roughest, bypassed=r.bypassed)
        results.progress(min(int(rows), int(options.rows)), int(options.rows), f"worst {r.worst:.3f}")
    print(summarise(results))
    return 0


def summarise(results: Results) -> str:
    steps = [r for r in results.records if r["kind"] == "steps"]
    rows, alarms = sum(r["rows"] for r in steps), sum(sum(r["alarms"].values()) for r in steps)
    worst, limit = max(float(r["worst"]) for r in steps), intervals.upper_limit(alarms, rows)
    results.replace("summary", rows=rows, alarms=alarms, rate_below=limit, confidence=0.95, worst=worst)
    rate = f"rate below {limit:.2g} at 95 %"
    return f"{results.path.stem}: {alarms} alarms in {rows:,} rows ({rate}), worst residual {worst:.3f} of its bound"
