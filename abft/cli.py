"""The command line: ``python -m abft calibrate`` reads, compares and rolls back calibrations (``abft.calibrate`` makes them)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from abft.calibration import Calibration, rollback
from abft.errors import CalibrationError


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status: 0, 1 where two calibrations differ, 2 for what cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m abft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser("calibrate", help="compare two calibrations, or go back to the one before")
    what = calibrate.add_mutually_exclusive_group(required=True)
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="what changed from A to B; exit status 1 if anything did")
    what.add_argument("--rollback", metavar="FILE", help="exchange FILE with FILE.previous, which saving kept")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            first, second = (Calibration.load(path) for path in options.compare)
            print(first.compare(second))
            return int(first.hash != second.hash)
        restored = rollback(options.rollback)
    except CalibrationError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.rollback} is {restored.hash} again, of {restored.provenance.get('time', 'an unknown time')}")
    return 0
