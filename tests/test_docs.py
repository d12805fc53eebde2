"""The Python in README.md and docs/ runs: the blocks of a file in order, in one namespace; README.md knows the layers.

A block that opens with ```python no-run is shown but not run.
"""

import re
from pathlib import Path

import pytest

from fusedbayes.nn import LAYERS, BayesModule, BayesTransposedLinear

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


def test_the_readme_says_which_layers_have_which_estimators() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| layer | fusedbayes |") :].split("\n\n")[0].splitlines()[2:]
    ours = {row.split("|")[1].strip(): row.split("|")[2].split() for row in table}
    said = {
        layer: letters
        for names, letters in ours.items()
        for layer in LAYERS
        if re.search(rf"\b{_in_the_readme(layer)}\b", names)
    }
    assert said == {layer: [e[0] for e in layer.estimators] for layer in LAYERS}


def _in_the_readme(layer: type[BayesModule]) -> str:
    """Hugging Face's layer has a name of its own, and transposed convolutions share one: "ConvTranspose1d, 2d, 3d"."""
    if layer is BayesTransposedLinear:
        return "Conv1D"
    return re.sub(r"(ConvTranspose)[23]d", r"\g<1>1d", layer.__name__.removeprefix("Bayes"))
