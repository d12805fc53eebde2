"""The Python in README.md and docs/ runs: the blocks of a file in order, in one namespace.

A block that opens with ```python no-run is shown but not run.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("README.md"), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize(
    "file", [file for file in FILES if "```python" in file.read_text()], ids=lambda file: file.name
)
def test_blocks_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text = file.read_text()
    blocks = list(re.finditer(r"^```python( no-run)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python"), "a fence is indented, unclosed or misspelt"
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if not block[1]:
            # Empty lines in front, so that a traceback gives the line of the file.
            before = "\n" * text.count("\n", 0, block.start(2))
            exec(compile(before + block[2], str(file), "exec"), namespace)
