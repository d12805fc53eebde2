"""What got slower: two sets of results of one device, side by side.

    python -m bench.compare OLD NEW

Times are compared as multiples of nn.Linear's in the same run, because the machine's own speed changes from day to day.
Prints what takes more than 10 % longer or has no result any more; the exit status is 1 if fusedbayes is among it.
"""

import argparse
from pathlib import Path

from bench.implementations import BASELINE, OURS
from bench.report import Record, by_case, load

TOLERANCE = 1.10


def slower(old: list[Record], new: list[Record]) -> list[tuple[str, str, str, float]]:
    """(group, case, implementation, factor) of what takes more than 10 % longer, the worst first."""
    found = []
    before = by_case(old)
    for key, rows in by_case(new).items():
        for name, row in rows.items():
            was = before.get(key, {})
            if name == BASELINE or name not in was or BASELINE not in was or BASELINE not in rows:
                continue
            factor = _relative(rows, row) / _relative(was, was[name])
            if factor > TOLERANCE:
                found.append((*key, name, factor))
    return sorted(found, key=lambda entry: -entry[-1])


def missing(old: list[Record], new: list[Record]) -> list[tuple[str, str, str]]:
    """(group, case, implementation) of what had a result and has none, among the cases that were measured again."""
    now = by_case(new)
    return [(*key, name) for key, rows in by_case(old).items() if key in now for name in rows if name not in now[key]]


def _relative(rows: dict[str, Record], row: Record) -> float:
    return row["median_s"] / rows[BASELINE]["median_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old, new = load([arguments.old]), load([arguments.new])
    if old[0]["device"] != new[0]["device"]:
        raise SystemExit(f"results of different devices: {old[0]['device']!r} and {new[0]['device']!r}")
    found, lost = slower(old, new), missing(old, new)
    for group, case, name in lost:
        print(f"no result any more: {name}, {group}: {case}")
    for group, case, name, factor in found:
        print(f"{factor:.2f} times as slow: {name}, {group}: {case}")
    if not found and not lost:
        print("nothing is more than 10 % slower")
    raise SystemExit(any(name == OURS for *_, name in lost) or any(name == OURS for _, _, name, _ in found))


if __name__ == "__main__":
    main()
