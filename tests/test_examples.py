"""The scripts in examples/ run, write what they promise to, and notice a network that has not learnt."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Script, arguments that train for next to nothing, and the files that it writes.
EXAMPLES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("digits", ("--epochs=1",), ("digits.pt", "reliability.png", "entropy.png")),
    ("regression_1d", ("--steps=3",), ("regression-1d.png",)),
    ("convnet", ("--epochs=1", "--samples=2"), ("convnet.png",)),
    ("transformer", ("--steps=3", "--samples=2"), ("transformer.png",)),
    ("pruning", ("--epochs=1", "--networks=1"), ("pruning.png",)),
)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {name for name, *_ in EXAMPLES}


@pytest.mark.parametrize(("name", "arguments", "files"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_example_runs(
    name: str, arguments: tuple[str, ...], files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # where a script finds the others
    monkeypatch.setattr(sys, "argv", [f"{name}.py", f"--out={tmp_path}", *arguments])
    # Hardly trained, the network falls short of what the script promises, which its last check has to say.
    with pytest.raises(SystemExit, match=r"^expected |: expected "):
        importlib.import_module(name).main()
    assert all((tmp_path / file).stat().st_size > 0 for file in files)
