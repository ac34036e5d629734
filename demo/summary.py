"""What a person reads at the end: each act's table, what its columns mean, and what it showed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import marginal, tables
from .faultlog import Tally
from .retrieval import Retrieval
from .training import YARDSTICK, Distance, Run, Text


def of_retrieval(result: Retrieval) -> str:
    lines = [
        f"(a) RETRIEVAL  {result.questions} questions to {result.passages} docstrings (corpus {result.corpus_sha256[:12]})",
        f"  Fault-free, the expected docstring comes first for {result.top1:.0%} of the questions, among three for {result.top3:.0%}.",
        tables.retrieval_table(result),
        "  harmful: changes a row of a product by ≥ 1e-3.  missed: asked under a harmful fault, nothing detected.",
        "  alarms: detections without a fault.  wrong, top-5: not the fault-free answer, not its list of five.",
        "  ms: median of a request, under faults with the injector's own work (at 0 % without).",
        "  The fault-free arm is torch's own; the others compute attention (QKᵀ, softmax, PV) in abft's reference for a CPU.",
    ]
    example = next((example for example in result.wrong_answers if example.arm == "unprotected"), None)
    if example is not None:
        lines += [
            f"  Unprotected, asked “{example.question}”:",
            f"    {example.wrong} was the answer and not {example.right},",
            f"    after {example.fault}.",
        ]
    for name in ("protected", "DMR"):
        arms = [arm for arm in result.arms if arm.arm == name]
        wrong, asked = sum(arm.wrong for arm in arms), sum(arm.requests for arm in arms)
        lines.append(f"  {name}: {wrong} wrong answers in {asked} requests; {_undetected(arm.faults for arm in arms)}")
    return "\n".join(lines)


def of_training(text: Text, rows: Sequence[tuple[Run, Distance]]) -> str:
    run = rows[0][0]
    guarded, equal = _arm(rows, "protected"), sum(distance.bit_equal for _, distance in _arm(rows, "protected"))
    skipped = sum(run.skipped for run, _ in _arm(rows, "NaN watching"))
    replays, dropped = sum(run.replays for run, _ in guarded), sum(run.dropped for run, _ in guarded)
    lines = [
        f"(b) TRAINING  {len(run.losses)} steps of a GPT with {run.parameters.numel() / 1e6:.2f} M parameters on "
        f"{text.characters / 1e6:.1f} M characters (corpus {text.sha256[:12]})",
        tables.training_table(rows),
        "  Δ: against the fault-free run of the same seed.  held-out: final loss on other text, without faults.",
        "  reversed: the same batches, their rows in reverse: what separates it is rounding alone.",
        "  ms: mean of a step, except in the fault-free runs with the injector's own work; in all of them attention is abft's reference",
        "  for a CPU, checked in the protected ones only.",
        f"  NaN watching skipped {skipped} steps; StepGuard replayed {replays} and dropped {dropped}.",
        f"  Largest |Δloss|: unprotected {_furthest(rows, 'unprotected')}, protected {_furthest(rows, 'protected')}, "
        f"rounding {_furthest(rows, YARDSTICK)}.",
        f"  protected: {equal} of {len(guarded)} runs bit-equal; {_undetected(run.faults for run, _ in guarded)}",
    ]
    return "\n".join(lines)


def of_marginal(rows: Sequence[tuple[marginal.Run, Distance]]) -> str:
    reference, left_in, watched = (rows[at][0] for at in range(len(marginal.ARMS)))
    lines = [
        f"(c) A MARGINAL UNIT  {marginal.DEVICES} simulated devices train one GPT for {len(watched.losses)} steps; from step "
        f"{marginal.ONSET} on device{marginal.MARGINAL} adds",
        f"  {marginal.FIRST:.0e}, about 0.1 σ of its residuals, to one column of every forward product, and twice as much every "
        f"{marginal.DOUBLING} steps.",
        tables.marginal_table(rows),
        "  beyond bound: what checksums say.  began: the step from which the statistics date it.  back to: the checkpoint before that.",
        "  Δ: against the fault-free run of the same seed; 0: every bit is the same.",
    ]
    if watched.blamed < 0:
        return "\n".join([*lines, "  No device was named."])
    gap = abs(left_in.losses[watched.found] - reference.losses[watched.found])
    lines += [
        f"  Named at step {watched.found}, when it added {watched.amount:.0e}: its largest residual was {watched.of_bound:.2f} of the "
        "bound, and the loss of the run",
        f"  that left it in was off by {tables.number(gap, '.0e')}. The alarm: {watched.message.partition('; rank')[0]}.",
    ]
    return "\n".join(lines)


def _undetected(tallies: Iterable[Tally]) -> str:
    """What slipped through: the faults below the floor."""
    tallies = list(tallies)
    unseen = sum(tally.struck - tally.detected for tally in tallies)
    if not unseen:
        return "every fault was detected."
    worst = max(tally.largest_undetected for tally in tallies)
    return f"{unseen} faults undetected, the worst changed a row by {worst:.0e}."


def _arm(rows: Sequence[tuple[Run, Distance]], name: str) -> list[tuple[Run, Distance]]:
    return [(run, distance) for run, distance in rows if run.arm == name]


def _furthest(rows: Sequence[tuple[Run, Distance]], name: str) -> str:
    return tables.number(max(distance.max_loss for _, distance in _arm(rows, name)), ".0e")
