"""``python -m demo``: three acts under faults, then a table, plots and a record.

(a) retrieval   a pretrained sentence encoder answers questions about the standard library
(b) training    a small GPT learns the standard library's sources
(c) marginal    four devices train one together, and one of them is off by less than any check sees
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .plan import DEFAULT, FULL, QUICK, Plan


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    plan: Plan = options.plan
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: cannot create the output folder {out}: {error.strerror}", file=sys.stderr)
        return 2

    # What an earlier run left would stand beside this run's numbers and contradict them.
    for old in (out / "results.jsonl", out / "wrong_answers.png", out / "marginal_unit.png", *out.glob("loss_*_percent.png")):
        old.unlink(missing_ok=True)

    # Imported late: --help and a mistyped argument must not wait for torch.
    import abft

    from .record import Record, surroundings

    start = time.perf_counter()
    mixture = abft.inject.Mixture.gpu_2026().name
    with Record(out / "results.jsonl") as record:
        where = surroundings()
        record.write("run", plan=asdict(plan), seed=options.seed, mixture=mixture, **where)
        print(
            f"abft demo ({plan.name}): torch {where['versions'].get('torch')}, {where['torch_threads']} threads, "
            f"{where['machine']['cpu']}; seed {options.seed}"
        )
        reports = []
        if options.only in (None, "encoder"):
            reports.append(_act_a(plan, options.seed, out, record))
        if options.only in (None, "gpt"):
            reports.append(_act_b(plan, options.seed, out, record))
        if options.only in (None, "marginal"):
            reports.append(_act_c(plan, options.seed, out, record))
        seconds = time.perf_counter() - start
        record.write("end", seconds=round(seconds, 1))
    print("\n" + "\n\n".join(report for report in reports if report))
    print(f"\n{seconds:.0f} s; numbers and plots: {out}/ ({', '.join(sorted(path.name for path in out.iterdir()))})")
    # Asked for act (a) alone and it could not run: nothing was shown.
    return 0 if any(reports) else 1


def _act_a(plan: Plan, seed: int, out: Path, record) -> str:
    from . import charts, encoder, retrieval, summary

    print("\n(a) retrieval: all-MiniLM-L6-v2 answers questions from Python's documentation strings")
    try:
        loaded = encoder.load()
    except encoder.EncoderUnavailable as reason:
        print(f"  left out: {reason}")
        record.write("retrieval_unavailable", reason=str(reason))
        return ""
    result = retrieval.run(loaded, plan, seed)
    record.write(
        "retrieval",
        corpus_sha256=result.corpus_sha256,
        passages=result.passages,
        questions=result.questions,
        top1=result.top1,
        top3=result.top3,
        weights_sha256=encoder.WEIGHTS_SHA256,
    )
    for arm in result.arms:
        record.write("retrieval_arm", seed=seed, **arm.record())
    for example in result.wrong_answers:
        record.write("wrong_answer", **asdict(example))
    _plot(charts.wrong_answers, result, out / "wrong_answers.png")
    return summary.of_retrieval(result)


def _act_b(plan: Plan, seed: int, out: Path, record) -> str:
    from . import charts, summary
    from .progress import Progress
    from .training import ARMS, YARDSTICK, Distance, Run, Text, train

    print("\n(b) training: a character GPT learns Python's own sources")
    text = Text.read()
    record.write("training", corpus_sha256=text.sha256, characters=text.characters, symbols=text.symbols)
    faulty = [(arm, rate) for rate in plan.training_rates for arm in ARMS[1:]]
    rows: list[tuple[Run, Distance]] = []
    with Progress("training", plan.training_seeds * (2 + len(faulty)) * plan.steps) as bar:
        for run_seed in range(seed, seed + plan.training_seeds):
            runs: list[Run] = []
            for arm, rate in [(ARMS[0], 0.0), (YARDSTICK, 0.0), *faulty]:
                runs.append(train(arm, text, steps=plan.steps, rate=rate, seed=run_seed, bar=bar))
                rows.append((runs[-1], Distance.between(runs[-1], runs[0])))
                record.write("training_run", **runs[-1].record(), distance=asdict(rows[-1][1]))
            if run_seed == seed:  # the other seeds are in the table and in the record
                for rate in plan.training_rates:
                    shown = [run for run in runs if run.rate in (0.0, rate)]
                    _plot(charts.loss_curves, shown, out / f"loss_{round(100 * rate)}_percent.png")
    return summary.of_training(text, rows)


def _act_c(plan: Plan, seed: int, out: Path, record) -> str:
    from . import charts, marginal, summary
    from .progress import Progress
    from .training import Distance, Text

    print(f"\n(c) a marginal unit: {marginal.DEVICES} simulated devices train one GPT, and device{marginal.MARGINAL} goes bad slowly")
    text = Text.read()
    rows: list[tuple[marginal.Run, Distance]] = []
    with Progress("training", plan.training_seeds * len(marginal.ARMS) * plan.marginal_steps) as bar:
        for run_seed in range(seed, seed + plan.training_seeds):
            runs: list[marginal.Run] = []
            for arm in marginal.ARMS:
                runs.append(marginal.train(arm, text, steps=plan.marginal_steps, seed=run_seed, bar=bar))
                rows.append((runs[-1], Distance.between(runs[-1], runs[0])))
                record.write("marginal_run", seed=run_seed, **runs[-1].record(), distance=asdict(rows[-1][1]))
            if run_seed == seed:
                _plot(charts.marginal_unit, runs, out / "marginal_unit.png")
    return summary.of_marginal(rows)


def _plot(draw, data, path: Path) -> None:
    from .charts import PlotsUnavailable

    try:
        draw(data, path)
    except PlotsUnavailable as reason:
        print(f"  {reason}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description="Two models under faults: with and without abft.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="plan", action="store_const", const=QUICK, help="under a minute on two cores")
    size.add_argument("--full", dest="plan", action="store_const", const=FULL, help="5, 10 and 20 %% in the first two acts, several seeds")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for results.jsonl and plots (%(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="of data, weights and faults (%(default)s)")
    parser.add_argument("--only", choices=("encoder", "gpt", "marginal"), help="one act alone: (a), (b), (c)")
    parser.set_defaults(plan=DEFAULT)
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; give a folder")
    return options


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 0 <= seed < 2**31:
        raise argparse.ArgumentTypeError(f"{seed} is not between 0 and 2**31 - 1")
    return seed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ndemo: interrupted; results.jsonl keeps what was finished", file=sys.stderr)
        sys.exit(130)
