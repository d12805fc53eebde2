"""A small Bayesian transformer that reads Python, and notices when it is shown something else.

An ordinary nn.TransformerEncoder with embeddings and a linear head is converted with one call and trained by the ELBO
to predict the next character of Python's own standard library; the same net trained by cross-entropy stands beside it.
Both then read modules that were held out, once as they are, once in rot13 (letters become other letters, layout and
punctuation stay) and once backwards (the same characters in the other order). Runs on the GPU if there is one::

    python examples/transformer.py --out examples/output
"""

import argparse
import codecs
import importlib
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from regression_1d import BLUE, ORANGE
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from tqdm import trange

import fusedbayes as fb

# In every Python from 3.10 on, if not in the same words.
LEARNT = (
    "argparse bdb calendar cmd configparser csv dataclasses difflib doctest fractions ftplib imaplib inspect ipaddress "
    "mailbox optparse pickle pydoc shutil smtplib statistics subprocess tarfile tempfile traceback uuid"
)
HELD_OUT = "shlex textwrap"
CHARACTERS = 128  # of ASCII
CONTEXT = 64  # characters that the model sees at most
BATCH = 16  # windows
WIDTH, HEADS, LAYERS = 64, 4, 2
PASSAGE = 4  # windows that are judged together: 256 characters
COLOURS = (BLUE, "#009e73", ORANGE)  # of the texts; the green is of the same palette
LETTERS = {"family": "monospace", "fontsize": 11}


class CharacterModel(nn.Module):
    """Logits of the next character after each: (windows, length) of int64 to (windows, length, CHARACTERS)."""

    def __init__(self) -> None:
        super().__init__()
        self.character = nn.Embedding(CHARACTERS, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        positions = torch.arange(length, device=characters.device)[None]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=characters.device)
        x = self.character(characters) + self.position(positions)
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class Reading(NamedTuple):
    """What a network makes of a text, for each character of it: (windows, CONTEXT)."""

    bits: Tensor
    entropy: Tensor
    mutual_information: Tensor


def read(modules: str) -> str:
    """The sources of standard modules, one after the other; what is not ASCII becomes a question mark."""
    files = [importlib.import_module(module).__file__ for module in modules.split()]
    return "\n".join(Path(file).read_text(encoding="utf-8") for file in files).encode("ascii", "replace").decode()


def encode(text: str, device: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii")), device=device)


def nll(logits: Tensor, characters: Tensor) -> Tensor:
    """Mean over the characters of the batch, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), characters.flatten())


def train(elbo: fb.ELBO | None, model: nn.Module, text: Tensor, steps: int, name: str) -> None:
    """Trains by the ELBO, or by cross-entropy alone if there is none."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    window = torch.arange(CONTEXT + 1, device=text.device)
    progress = trange(steps, desc=name, unit="step", mininterval=0.5)
    for step in progress:
        begin = torch.randint(len(text) - CONTEXT, (BATCH, 1)).to(text.device)
        windows = text[begin + window]
        x, y = windows[:, :-1], windows[:, 1:]
        loss = nll(model(x), y) if elbo is None else elbo(x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def read_on(model: nn.Module, text: str, num_samples: int, device: str) -> Reading:
    """The network's predictions for each character of a text but the first, window by window."""
    parts = []
    for windows in encode(text, device).unfold(0, CONTEXT + 1, CONTEXT).split(64):
        x, y = windows[:, :-1], windows[:, 1:]
        if num_samples == 0:  # an ordinary network: its one output
            with torch.no_grad():
                prediction = fb.Prediction(model(x)[None])
        else:
            prediction = fb.predict(model, x, num_samples, seed=0)
        bits = -prediction.log_mean_probs.gather(-1, y[..., None])[..., 0] / math.log(2.0)
        parts.append((bits, prediction.predictive_entropy, prediction.mutual_information))
    return Reading(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def of_passages(values: Tensor) -> Tensor:
    """Means over passages of PASSAGE windows; a last one that is shorter is left out."""
    return torch.stack([passage.mean() for passage in values.split(PASSAGE) if len(passage) == PASSAGE])


def auroc(code: Tensor, other: Tensor) -> float:
    """Of telling the passages of another text from those of code by these values of their characters."""
    scores = [of_passages(code), of_passages(other)]
    is_other = [torch.zeros(len(scores[0]), dtype=torch.long), torch.ones(len(scores[1]), dtype=torch.long)]
    return binary_auroc(torch.cat(scores), torch.cat(is_other)).item()


def report(name: str, readings: dict[str, Reading]) -> None:
    code = readings["code"]
    print(f"\n{name:16}{'bits':>7}{'entropy':>9}{'AUROC':>7}{'epistemic':>11}{'AUROC':>7}")
    for text, reading in readings.items():
        by_entropy, by_information = auroc(code.entropy, reading.entropy), auroc(code[2], reading[2])
        entropy, information = reading.entropy.mean(), reading.mutual_information.mean()
        print(
            f"{text:16}{reading.bits.mean():7.3f}{entropy:9.3f}{by_entropy:7.3f}{information:11.4f}{by_information:7.3f}"
        )


def plot(line: dict[str, tuple[str, Reading]], readings: dict[str, Reading], path: Path) -> None:
    """Mutual information of each character of one stretch of code, and of whole passages, in each form of the text."""
    figure, panels = plt.subplots(
        len(line), 2, figsize=(14, 5.6), width_ratios=[2.6, 1], sharex="col", sharey="col", layout="constrained"
    )
    passages = {form: of_passages(reading.mutual_information) for form, reading in readings.items()}
    bins = torch.linspace(0.0, max(values.max().item() for values in passages.values()), 41)
    for (characters, means), (form, (text, reading)), colour in zip(panels, line.items(), COLOURS, strict=True):
        characters.bar(range(CONTEXT), reading.mutual_information[0].numpy(), width=0.85, color=colour)
        characters.set_xlim(-0.7, CONTEXT - 0.3)
        characters.set_xticks([])
        for place, character in enumerate(text[1:].replace("\n", "↵")):
            # The characters lie below the axis, in its coordinates.
            characters.text(
                place, -0.05, character, transform=characters.get_xaxis_transform(), ha="center", va="top", **LETTERS
            )
        characters.set_title(form, fontsize=13, loc="left")
        characters.set_ylabel("nats", fontsize=12)
        means.hist(passages[form].numpy(), bins.numpy(), color=colour)
        means.set_ylabel("passages", fontsize=12)
        if form != "code":
            found = auroc(readings["code"].mutual_information, readings[form].mutual_information)
            means.set_title(f"AUROC {found:.3f} against code", fontsize=13, loc="left")
    panels[0, 1].set_title(f"means of {PASSAGE * CONTEXT} characters", fontsize=13, loc="left")
    panels[-1, 1].set_xlabel("nats", fontsize=12)
    figure.suptitle("Mutual information between the next character and the weights", fontsize=14)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where the figure goes")
    parser.add_argument("--steps", type=int, default=2000, help="steps of Adam for each network (default 2000)")
    parser.add_argument("--samples", type=int, default=16, help="draws of the weights in predictions (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, batches and noise (default 0)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learnt, code = encode(read(LEARNT), device), read(HELD_OUT)
    print(f"{len(learnt)} characters to learn from, {len(code)} held out, on {device}")

    ordinary = CharacterModel().to(device)
    train(None, ordinary, learnt, arguments.steps, "ordinary")

    model, conversion = fb.to_bayesian(CharacterModel().to(device), return_report=True)
    print(f"\n{conversion}\n")
    # A text's log likelihood is a sum over its characters, and nll a mean over those of a batch: the characters are the
    # data, not the windows, which show each of them many times over, after more or less of what precedes it. There are
    # ten characters for each weight, enough for the whole KL: nothing is tempered.
    train(fb.ELBO(model, nll, num_data=len(learnt)), model, learnt, arguments.steps, "Bayesian")

    forms = {
        "code": lambda text: text,
        "rot13": lambda text: codecs.encode(text, "rot13"),
        "backwards": lambda t: t[::-1],
    }
    readings = {}
    for name, network, samples in (("ordinary", ordinary, 0), ("Bayesian", model, arguments.samples)):
        readings[name] = {form: read_on(network, change(code), samples, device) for form, change in forms.items()}
        report(name, readings[name])

    begin = code.index("    def ")
    stretch = {form: change(code[begin : begin + CONTEXT + 1]) for form, change in forms.items()}
    line = {form: (text, read_on(model, text, arguments.samples, device)) for form, text in stretch.items()}
    path = arguments.out / "transformer.png"
    plot(line, readings["Bayesian"], path)
    print(f"\nwrote {path}")
    bits = [reading["code"].bits.mean().item() for reading in readings.values()]
    known, backwards = readings["Bayesian"]["code"], readings["Bayesian"]["backwards"]
    found = auroc(known.mutual_information, backwards.mutual_information)
    if bits[1] > min(bits[0] + 0.1, 3.0) or found < 0.8:
        raise SystemExit(
            "expected at most 3 bits per character, at most 0.1 more than the ordinary network's, and AUROC >= 0.8, "
            f"got {bits[1]:.3f}, {bits[0]:.3f} and {found:.3f}"
        )


if __name__ == "__main__":
    main()
