"""``python -m bench COMMAND [options]``: without a command, what there is."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "clean": "fault-free rows of every data family through the public path: alarms, largest residual over bound",
    "emulated-clean": "the same on emulated tensor cores (needs the emulator: --emulator or ABFT_EMULATOR)",
    "emulated-kernels": "the kernels themselves, interpreted on emulated tensor cores: products and attention, both ways, fault-free",
    "campaign": "faults of every class, place, pattern and role through abft.inject: detected, repaired, located, missed",
    "integer": "int8 products: clean rows, faults of every class, cost against torch's",
    "emulated-faults": "flips and nullifications in emulated tensor-core accumulators, weights and panels",
    "floors": "the smallest deviation found, per backend, dtype and K, beside threshold.expected_floor",
    "activations": "a real sentence encoder's activations and gradients, fault-free",
    "attention-clean": "fault-free attention: the largest residual of every check",
    "attention-faults": "random faults in every place inside attention: detected, repaired, missed",
    "attention-scores": "the same in the scores of the interpreted kernels, a fault in every row of a launch",
    "adaptive": "the adaptive policy against fixed levels at several rates of real faults, and through a step of the rate",
    "prediction": "uncorrected faults predicted on simulated fleets that the predictor has not seen",
    "training-faults": "trainings with 5, 10 and 20 % of the steps struck, protected and not, beside the spread of fault-free seeds",
    "memory": "bytes of panels, per direction and group",
    "work": "what a repair computes again, of what the product computed: tiles counted in the interpreted kernels",
    "statistics": "the second detector: a drifting training run, a marginal unit, harmless flips, its cost",
    "linear": "times of linear layers: torch, abft in every form, repetition, the unchecked kernel; each beside its evidence",
    "layer": "… of a transformer layer",
    "model": "… of a whole model",
    "train": "… of a training step",
    "in-step": "what protection adds to whole models, to half a per cent: everyone does a part before anyone does the next",
    "attention": "… of attention alone, beside each of torch's kernels",
    "scaling": "cost against K, N, M and G, beside what counting predicts",
    "tune": "search launch shapes on a GPU, and write the table that the kernels read",
    "gpu": "the one call for a rented GPU: tests, calibration, times, campaigns, each in a process and a time of its own",
    "ceilings": "what the machine can do at best: copying memory, the vendor's product, issuing a call",
    "calibrate": "fault-free residuals over bounds on the device at hand, and how its matrix units accumulate",
    "kernel-tests": "the tests of the kernels, natively, each outcome written as it comes; with --sanitizer under compute-sanitizer",
    "host": "cost of the dispatch, and of a small checked linear beside torch's",
    "summary": "the committed results as one table",
    "audit": "every kernel compiled: registers, spills, shared memory, occupancy, instructions; --compare with the committed audit",
    "predict": "what the check should cost on a GPU, counted from waves and instructions; not a measurement",
}
MODULES = {
    "predict": "predictions",
    "in-step": "in_step",
    "training-faults": "training_faults",
    "emulated-clean": "emulated_clean",
    "emulated-faults": "emulated_faults",
    "emulated-kernels": "emulated_kernels",
    "kernel-tests": "kernel_tests",
    "attention-faults": "attention_faults",
    "attention-scores": "attention_scores",
    "attention-clean": "attention_clean",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        for name, meaning in COMMANDS.items():
            print(f"  {name:<16} {meaning}")
        return 0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2
    name = sys.argv[1]
    module = importlib.import_module(f"bench.{MODULES.get(name, name)}")
    return module.main(sys.argv[2:]) or 0


if __name__ == "__main__":
    sys.exit(main())
