"""The committed results as one table.

    python -m bench summary
"""

from __future__ import annotations

import argparse

from bench.results import FOLDER, read


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench summary", description=__doc__).parse_args(argv)
    for path in sorted(FOLDER.glob("*.jsonl")):
        records = read(path)
        stamp = next((r for r in records if r.get("kind") == "stamp"), {})
        found = next((r for r in reversed(records) if r.get("kind") == "summary"), None)
        print(f"{path.stem}  ({stamp.get('date')}, {stamp.get('commit')}, {stamp.get('cpu')}, torch {stamp.get('torch')})")
        if found is None:
            print(f"  {sum(r.get('kind') != 'stamp' for r in records)} records")
        elif "alarms" in found:
            rate = f"rate below {found['rate_below']} at 95 %"
            print(f"  {found['alarms']} alarms in {found['rows']:,} rows: {rate}; worst residual / bound {found['worst']}")
        else:
            for name, s in (found.get("places") or found.get("table")).items():
                which = f"harmful {s['harmful']:>8}, found {s['harmful_detected']:>8} (≥ {s['harmful_detected_at_least']})"
                repaired = f"; repaired {s['repaired']}/{s['detected']}" if "repaired" in s else ""
                print(f"  {name:<14} {s['trials']:>8} faults; {which}{repaired}")
    return 0
