"""Everything that only a CUDA GPU can tell, in one process and at most 10 minutes.

    python -m bench.gpu --out DIR

Runs the tests marked gpu, the full benchmark and the candidate search, one after another; each leaves its log and
results in DIR as it goes, so that an interruption keeps what was done. Libraries to compare with take part if they can
be imported. Runs from a checkout, installed or not.
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

ROOT = Path(__file__).parent.parent


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
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs a CUDA GPU")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    records = out / "records.jsonl"
    records.unlink(missing_ok=True)
    steps: dict[str, Callable[[], int]] = {
        "tests": lambda: int(pytest.main([str(ROOT / "tests"), "-m", "gpu", "-q", "-p", "no:cacheprovider"])),
        "bench": lambda: int(pytest.main([str(ROOT / "bench"), "--full", "-q", f"--records={records}"])),
        "report": lambda: _program(report.main, str(records), "--out", str(out), "--save", "full"),
        "tune": lambda: _program(tune.main, "--out", str(out / "tune.json")),
    }
    failed = []
    for name, step in steps.items():
        start = time.monotonic()
        with (out / f"{name}.log").open("w", buffering=1) as log, contextlib.redirect_stdout(log):
            status = step()
        if status != 0:
            failed.append(name)
        print(f"{name}: exit status {status}, {time.monotonic() - start:.0f} s, see {name}.log", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
