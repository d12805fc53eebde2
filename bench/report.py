"""Tables and figures of benchmark results.

    python -m bench.report FILE... [--out DIR] [--save NAME]

Reads the records that ``pytest bench --records FILE`` or this program wrote. Prints a table for each group and draws
figures into DIR (default bench/results/<device>); with --save it also keeps the records there as NAME.json.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator

from bench.cases import GROUPS
from bench.implementations import BASELINE, FAMILY, OURS, REFERENCE
from bench.measure import device_name

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
# The same in every figure, whoever is missing from it.
COLORS = {
    BASELINE: "0.6",
    **dict(zip(FAMILY, ("black", "tab:olive", "tab:brown"), strict=True)),
    REFERENCE: "tab:purple",
    "clean layer, eager": "tab:pink",
    "torch.compile": "tab:red",
    "bayesian-torch reparam": "tab:blue",
    "bayesian-torch flipout": "tab:cyan",
    "torchbnn": "tab:green",
    "BLiTZ": "tab:orange",
}


def load(files: list[Path]) -> list[Record]:
    """The records of several files of one device: a JSON list, or one record a line."""
    records: list[Record] = []
    for file in files:
        text = file.read_text()
        if text.startswith("["):
            records += json.loads(text)
        else:
            # What follows the last end of line was being written when the benchmark was interrupted.
            records += map(json.loads, text.split("\n")[:-1])
    if not records:
        raise SystemExit(f"no records in {', '.join(map(str, files)) or 'no file'}")
    if len(devices := {record["device"] for record in records}) > 1:
        raise SystemExit(f"records of different devices: {', '.join(sorted(devices))}")
    return records


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def by_case(records: list[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """(group, case) to implementation to record, in the order of the groups."""
    cases: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for record in sorted(records, key=lambda r: GROUPS.index(r["group"])):
        cases[record["group"], record["case"]][record["implementation"]] = record
    return dict(cases)


def fastest_rival(rows: dict[str, Record]) -> Record | None:
    """The fastest of the implementations that somebody else offers."""
    rivals = [row for name, row in rows.items() if name not in (BASELINE, REFERENCE, *FAMILY)]
    return min(rivals, key=lambda row: row["median_s"], default=None)


def tables(records: list[Record]) -> str:
    """One table for each group, cases one under another, fastest first."""
    lines: list[str] = []
    cases = by_case(records)
    for group in GROUPS:
        if not any(g == group for g, _ in cases):
            continue
        columns = ("case", "implementation", "time", "/ nn.Linear", "/ fastest rival", "floor / time", "peak", "kept")
        lines += ["", f"## {group}", "", "| " + " | ".join(columns) + " |", "|---|---|---:|---:|---:|---:|---:|---:|"]
        for (g, case), rows in cases.items():
            if g != group:
                continue
            baseline, rival = rows.get(BASELINE), fastest_rival(rows)
            for row in sorted(rows.values(), key=lambda row: row["median_s"]):
                ratios = [f"{row['median_s'] / other['median_s']:.2f}" if other else "-" for other in (baseline, rival)]
                share = "-" if row["share_of_floor"] is None else f"{row['share_of_floor']:.1%}"
                memory = [f"{row[key] / 2**20:.1f} MiB" for key in ("peak_bytes", "kept_bytes")]
                cells = [case, row["implementation"], _time(row["median_s"]), *ratios, share, *memory]
                lines.append("| " + " | ".join(cells) + " |")
                case = ""
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def draw_ratios(records: list[Record], out: Path) -> list[Path]:
    """Bars for each group: time relative to nn.Linear, case by case."""
    paths = []
    cases = by_case(records)
    names = list(dict.fromkeys(r["implementation"] for r in records if r["implementation"] != BASELINE))
    for group in GROUPS:
        rows = {case: rows for (g, case), rows in cases.items() if g == group and BASELINE in rows}
        if not rows:
            continue
        height = 1.2 + 0.16 * len(rows) * (len(names) + 1.5)
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        for i, name in enumerate(names):
            ratios = [r[name]["median_s"] / r[BASELINE]["median_s"] if name in r else math.nan for r in rows.values()]
            positions = [k + (i - len(names) / 2) / (len(names) + 1.5) for k in range(len(rows))]
            axes.barh(positions, ratios, height=1 / (len(names) + 1.5), label=name, color=COLORS[name])
        axes.axvline(1.0, color="0.6", linestyle="--", label=BASELINE)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xscale="log", xlabel="time relative to nn.Linear", title=group)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=4)
        paths.append(_save(figure, out / f"ratios-{slug(group)}.png"))
    return paths


def draw_over_rows(records: list[Record], out: Path) -> list[Path]:
    """Log-log lines of time over batch rows, for each group and precision, one panel a network."""
    paths = []
    names = list(dict.fromkeys(record["implementation"] for record in records))
    for group in ("forward", "forward+backward"):
        for precision in ("fp32", "bf16"):
            chosen = [r for r in records if r["group"] == group and r["precision"] == precision]
            rows_of: dict[str, set[int]] = defaultdict(set)
            for record in chosen:
                rows_of[record["network"]].add(record["rows"])
            networks = {network: sorted(rows) for network, rows in rows_of.items() if len(rows) > 1}
            if not networks:
                continue
            size = max(7.0, 4.5 * len(networks)), 4.8  # the legend needs 7
            figure, panels = plt.subplots(1, len(networks), figsize=size, squeeze=False, layout="constrained")
            for axes, network in zip(panels[0], networks, strict=True):
                for name in names:
                    points = sorted(
                        (r["rows"], 1e3 * r["median_s"])
                        for r in chosen
                        if r["network"] == network and r["implementation"] == name
                    )
                    width = 2.5 if name == OURS else 1.5
                    if points:
                        columns = zip(*points, strict=True)
                        axes.loglog(*columns, marker="o", label=name, color=COLORS[name], linewidth=width)
                axes.set(xlabel="batch rows", ylabel="time (ms)", title=f"{network}, {group}, {precision}")
                axes.set_xticks(networks[network], [str(rows) for rows in networks[network]], minor=False)
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
            handles, labels = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
            paths.append(_save(figure, out / f"rows-{slug(group)}-{precision}.png"))
    return paths


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="where figures go (default bench/results/<device>)")
    parser.add_argument("--save", metavar="NAME", help="keep the records there as NAME.json")
    parser.add_argument("--where", action="store_true", help="only print this device's folder of results")
    arguments = parser.parse_args()
    if arguments.where:
        device = device_name("cuda" if torch.cuda.is_available() else "cpu")
        print(RESULTS.relative_to(RESULTS.parent.parent) / slug(device))
        return
    records = load(arguments.files)
    first = records[0]
    out = arguments.out or RESULTS / slug(first["device"])
    out.mkdir(parents=True, exist_ok=True)
    print("{device}; torch {torch}, triton {triton}; {date}, commit {commit}".format(**first))
    rates = ", ".join(f"{first[f'flop_per_s_{p}'] / 1e9:.4g} GFLOP/s {p}" for p in ("fp32", "bf16"))
    print(f"measured ceilings: copy {first['bytes_per_s'] / 1e9:.4g} GB/s, {rates}")
    print(tables(records) + "\n")
    if arguments.save:
        path = out / f"{arguments.save}.json"
        path.write_text(json.dumps(records, indent=1) + "\n")
        print(f"wrote {path}")
    for path in draw_ratios(records, out) + draw_over_rows(records, out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
