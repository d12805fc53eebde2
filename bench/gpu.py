"""Everything that only a CUDA GPU can tell, in one process and at most 10 minutes.

    python -m bench.gpu --out DIR

Runs the tests marked gpu, the full benchmark and the candidate search, one after another, each within its share of the
time: what would begin later is skipped, and the log says so. Each leaves its log and results in DIR as it goes, so that
an interruption keeps what was done. Libraries to compare with take part if they can be imported. Runs from a checkout,
installed or not.
"""

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import report, tune
from bench.deadline import Deadline

ROOT = Path(__file__).parent.parent
# When the tests, the benchmark and the candidate search have to be done, as shares of the time.
TESTS_END, BENCH_END, TUNE_END = 0.35, 0.75, 0.97


def _program(main: Callable[[], None], *arguments: str) -> int:
    """Runs another program's main in this process; returns its exit status."""
    before, sys.argv = sys.argv, [main.__module__, *arguments]
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # one step's failure leaves the next ones their turn
        traceback.print_exc(file=sys.stdout)
        return 1
    finally:
        sys.argv = before
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together (default 10)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs a CUDA GPU")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    records = out / "records.jsonl"
    records.unlink(missing_ok=True)
    start = time.monotonic()
    tests_end, bench_end, tune_end = (start + 60 * arguments.minutes * s for s in (TESTS_END, BENCH_END, TUNE_END))
    tests = [str(ROOT / "tests"), "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    bench = [str(ROOT / "bench"), "--full", "-q", "-rs", "-p", "no:cacheprovider", f"--records={records}"]
    steps: dict[str, Callable[[], int]] = {
        "tests": lambda: int(pytest.main(tests, plugins=[Deadline(tests_end - time.monotonic())])),
        "bench": lambda: int(pytest.main([*bench, f"--minutes={(bench_end - time.monotonic()) / 60}"])),
        "report": lambda: _program(report.main, str(records), "--out", str(out), "--save", "full"),
        "tune": lambda: _program(
            tune.main, "--out", str(out / "tune.json"), "--seconds", str(tune_end - time.monotonic())
        ),
    }
    failed = []
    for name, step in steps.items():
        begin = time.monotonic()
        with (
            (out / f"{name}.log").open("w", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            status = step()
        if status != 0:
            failed.append(name)
        print(f"{name}: exit status {status}, {time.monotonic() - begin:.0f} s, see {name}.log", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
