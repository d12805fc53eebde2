"""Draws the figures of docs/kernels.md: `python docs/draw_kernels.py` writes docs/figures/kernels-*.png.

Lengths are tenths of an inch, from the upper left corner. The sizes in the labels are those of a 4096 x 4096 layer with
fp32 parameters, bf16 products and 64 batch rows on sm_90, unless they say otherwise.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

FIGURES = Path(__file__).parent / "figures"
WIDTH = 80


class Kind(NamedTuple):
    """What a box or an arrow stands for: its colours, its words in the legend, its outline."""

    fill: str
    edge: str
    legend: str = ""
    outline: str = "-"


Place = tuple[float, float, float, float]  # left and upper side, width, height
PARAMETER = Kind("#a9cdea", "#1f5f99", "mu, rho: read")
NOISE = Kind("#fdd9a8", "#c75b00", "noise: drawn, never stored", "--")
SAMPLE = Kind("#b3deb0", "#1d7a35", "W")
ACTIVATION = Kind("#d9c6e8", "#6a3590", "x, dY: read")
SUM = Kind("#fbf0b2", "#8a6d00", "sums in registers")
RESULT = Kind("#f7b9ae", "#b3271e", "written")
ALL = [PARAMETER, NOISE, SAMPLE, ACTIVATION, SUM, RESULT]
PLAIN = Kind("#ffffff", "#555555")
COLUMN = Kind("#c9c9c9", "#555555", "columns alone: once per program")
ROW = Kind("#f0f0f0", "#555555", "row alone: once per row")


class Drawing:
    """A figure with a title above, and what it comes to and a legend below."""

    def __init__(self, height: float, title: str, legend: list[Kind], conclusion: str) -> None:
        self.figure, self.axes = plt.subplots(figsize=(WIDTH / 10, height / 10))
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.write(1.5, 2.4, title, size=12, weight="bold", ha="left")
        self.write(WIDTH / 2, height - 6.2, conclusion, weight="bold")
        x = 1.5
        for kind in legend:
            self.box(kind, x, height - 3.8, 2.2, 1.6)
            self.write(x + 2.8, height - 3, kind.legend, ha="left")
            x += 4.6 + 0.64 * len(kind.legend)

    def write(self, x: float, y: float, text: str, size: float = 9, ha: str = "center", **style: str) -> None:
        self.axes.text(x, y, text, size=size, ha=ha, va="center", linespacing=1.25, **style)

    def box(self, kind: Kind, x: float, y: float, w: float, h: float, text: str = "") -> None:
        style = {"fc": kind.fill, "ec": kind.edge, "ls": kind.outline, "lw": 1.2, "zorder": 2}
        self.axes.add_patch(Rectangle((x, y), w, h, **style))
        self.write(x + w / 2, y + h / 2, text)

    def program(self, w: float, h: float, title: str) -> None:
        """The frame around what one program does."""
        style = {"boxstyle": "round,pad=0,rounding_size=1.2", "fc": "#f6f6f4", "ec": "#9a9a96", "zorder": 0}
        self.axes.add_patch(FancyBboxPatch((21, 5), w, h, **style))
        self.write(21 + w / 2, 6.5, title, weight="bold")

    def arrow(self, kind: Kind, x0: float, y0: float, x1: float, y1: float, head: str = "-|>") -> None:
        arrow = {"arrowstyle": head, "color": kind.edge, "lw": 1.5}
        self.axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow, zorder=5)

    def tensor(self, kind: Kind, place: Place, name: str, part: Place, tile: Place) -> None:
        """A tensor in memory; in fractions of its sides a program's part and, with the way it goes, a tile."""
        x, y, w, h = place
        for (left, top, width, height), alpha, line in (((0, 0, 1, 1), 0.25, 1.0), (part, 0.45, 0.0), (tile, 1.0, 1.2)):
            style = {"fc": kind.fill, "ec": kind.edge, "lw": line, "alpha": alpha}
            self.axes.add_patch(Rectangle((x + left * w, y + top * h), width * w, height * h, **style))
        self.write(x + w / 2, y - 1.2, name)
        right, bottom = x + (part[0] + part[2]) * w, y + (part[1] + part[3]) * h
        x, y = x + (left + width / 2) * w, y + (top + height / 2) * h  # the middle of the tile
        self.arrow(PLAIN, x, y, *((right, y) if width < part[2] else (x, bottom)), "->")

    def save(self, name: str) -> None:
        self.figure.savefig(FIGURES / f"kernels-{name}.png", dpi=160)
        plt.close(self.figure)


def draw_rounds(drawing: Drawing) -> None:
    """Of what the four words depend after each round, and what that leaves to do for each quad."""
    title = "What the words depend on, where a program walks down the rows"
    drawing.write(1.5, 23.6, title, ha="left", weight="bold")
    for i in range(4):
        drawing.write(12.5, 28.9 + 2.6 * i, f"x{i}", ha="right")
    depends = ["CRUU", "RUCC", "CCBR", "BBBC", "BBBB", "BBBB", "BBBB", "BBBB"]  # x0 to x3 after each round
    kinds = {"C": (COLUMN, "column"), "R": (ROW, "row"), "B": (NOISE, "both"), "U": (PLAIN, "constant")}
    for step, words in enumerate(depends):
        x = 14 + 8.1 * step
        drawing.write(x + 3.6, 26.4, f"round {step}" if step else "counter")
        for i, word in enumerate(words):
            drawing.box(kinds[word][0], x, 27.8 + 2.6 * i, 7.2, 2.2, kinds[word][1])
    for y, name, counts in ((39.8, "multiplications", "0012222"), (41.8, "xors", "0122222")):
        drawing.write(20.8, y, f"{name} per quad", ha="right")
        for step, count in enumerate(counts, start=1):
            drawing.write(17.6 + 8.1 * step, y, count)


def draw_noise() -> None:
    conclusion = "9 multiplications, not 14, and 11 xors, not 14: 5 instructions per weight instead of 7"
    legend = [SAMPLE, COLUMN, ROW, NOISE._replace(legend="both: for every quad")]
    drawing = Drawing(51, "Noise: one Philox call for four weights", legend, conclusion)
    drawing.write(10, 6, "mu, rho and W, (N, K)")
    for row in range(5):
        for column in range(16):
            kind = SAMPLE if row == 2 and column // 4 == 1 else PLAIN
            drawing.box(kind, 1.8 + column + column // 4 * 0.2, 7.4 + 1.7 * row, 1, 1.6)
    drawing.write(10, 18.3, "a quad: columns\n4q .. 4q+3 of a row")
    drawing.arrow(NOISE, 10.2, 11.6, 21.3, 11.6)
    drawing.box(NOISE, 21.5, 8, 17, 7.2, "Philox4x32, 7 rounds\nkey: seed; counter: (q,\nrow, sample, stream)")
    for i in range(4):
        y = 6.2 + 2.8 * i
        drawing.arrow(NOISE, 38.7, 11.6, 42.8, y + 1.1)
        drawing.box(NOISE, 43, y, 4.2, 2.2, f"x{i}")
        drawing.box(NOISE, 55.8, y, 4.2, 2.2, f"z{i}")
        drawing.arrow(NOISE, 60.2, y + 1.1, 72.8, y + 1.1)
        drawing.box(SAMPLE, 73, y, 4.8, 2.2, f"w{i}")
    for y in (6.2, 11.8):
        drawing.box(NOISE, 48.2, y, 6.6, 5, "Box,\nMuller")
    drawing.write(66.4, 4.6, "w = mu + sigma z")
    drawing.write(60.4, 18.7, "one thread: 16 bytes of mu, 16 of rho, no shuffle")
    draw_rounds(drawing)
    drawing.save("noise")


def draw_sampling() -> None:
    title, legend = "Sampling pass: W = mu + softplus(rho) eps, and the KL", [PARAMETER, NOISE, SAMPLE, SUM, RESULT]
    drawing = Drawing(50, title, legend, "Per weight: 8 bytes read, 2 written")
    part, row = (0.5, 0.4, 0.25, 0.3), (0.5, 0.4, 0.25, 0.05)
    drawing.program(37, 36.5, "one program, one warp: 16 rows of 512 columns")
    names = (
        "mu: a lane's four quads are 128 columns apart",
        "rho",
        "eps: a Philox call for each quad",
        "W = mu + sigma eps",
    )
    for y, name, kind in zip((10.4, 17, 23.6, 30.2), names, (PARAMETER, PARAMETER, NOISE, SAMPLE), strict=True):
        drawing.write(24.5, y - 1.3, name, ha="left")
        for i in range(4):
            drawing.box(kind, 24.5 + 7.6 * i, y, 7.2, 2.6, "32 quads")
    for y, name, end in ((8, "mu (N, K) fp32", 11.9), (25.5, "rho (N, K) fp32", 18.5)):
        drawing.tensor(PARAMETER, (2, y, 13.5, 12), name, part, row)
        drawing.arrow(PARAMETER, 12.3, y + 5.1, 24.3, end)
        drawing.write(18.2, end - 1.5 + 4.2 * (y > 8), "2 KB\na row", color=PARAMETER.edge)
    drawing.box(SUM, 24.5, 35, 30, 4.8, "sum of log2 sigma, sum of squares:\nper lane, down the rows")
    drawing.tensor(RESULT, (64.5, 17, 13.5, 12), "W (N, K) bf16", part, row)
    drawing.arrow(SAMPLE, 54.7, 31.5, 71, 22.1)
    drawing.write(65.8, 31, "1 KB a row", color=SAMPLE.edge)
    drawing.box(RESULT, 64.5, 35, 13.5, 4.8, "partial KL: 4 B\nper 8192 weights")
    drawing.arrow(RESULT, 54.7, 37.4, 64.3, 37.4)
    drawing.save("sampling")


def draw_product(
    drawing: Drawing, weight: str, other: str, result: str, columns: int = 64, weight_first: bool = True
) -> None:
    """The inside of a program that multiplies what it draws, 64 x `columns` weights at a time.

    The first operand stands to the left of the product, which is transposed if this is the weight.
    """
    drawing.program(37, 40, f"one program, {columns // 16} warps")
    loaded, sampled = f"{columns // 4} KB", 36.4 if weight_first else 47.6
    boxes = {f"mu\n{loaded}": PARAMETER, f"rho\n{loaded}": PARAMETER, f"eps\n64 x {columns}": NOISE}
    for i, (text, kind) in enumerate(boxes.items()):
        drawing.box(kind, 24.5, 14.5 + 9.8 * i, 8.2, 8.2, text)
        drawing.arrow(kind, 32.9, 18.6 + 9.8 * i, sampled - 0.2, 25.4 + 3 * i)
    if weight_first:
        drawing.box(SAMPLE, sampled, 24.3, 8.2, 8.2, f"${weight}$\n64 x {columns}\nbf16")
        drawing.box(ACTIVATION, 47.6, 8.4, 8.2, 8.2, f"${other}^T$\n{columns // 8} KB")
        drawing.box(SUM, 47.6, 24.3, 8.2, 8.2, f"${result}^T$\n64 x 64\nfp32")
        drawing.arrow(SAMPLE, 44.8, 28.4, 47.4, 28.4)
        drawing.arrow(ACTIVATION, 51.7, 16.8, 51.7, 24.1)
        drawing.write(47, 20.5, f"tensor cores,\n${weight}$ on the M side", ha="right")
    else:
        drawing.box(SAMPLE, sampled, 24.3, 8.2, 8.2, f"${weight}^T$\n{columns} x 64\nbf16")
        drawing.box(ACTIVATION, 36.4, 8.4, 8.2, 8.2, f"${other}$\n{columns // 8} KB")
        drawing.box(SUM, 47.6, 8.4, 8.2, 8.2, f"${result}$\n64 x 64\nfp32")
        drawing.arrow(ACTIVATION, 44.8, 12.5, 47.4, 12.5)
        drawing.arrow(SAMPLE, 51.7, 24.1, 51.7, 16.8)
        drawing.write(50.8, 19.1, f"tensor cores,\n${other}$ on the M side", ha="right")


def draw_traffic(
    drawing: Drawing, other: str, result: str, part: Place, tile: Place, splits: int = 4, weight_first: bool = True
) -> None:
    """What a product over some splits reads and writes: x or dY, mu and rho; partial results and their sum."""
    along = part[0] if part[2] > part[3] else part[1]
    drawing.tensor(ACTIVATION, (2, 8.4, 13.5, 4), other, (along, 0, 1 / splits, 1), (along, 0, 0.36 / splits, 1))
    drawing.arrow(ACTIVATION, 15.7, 10.4, 47.4 if weight_first else 36.2, 10.4)
    for y, name, end in ((17, "mu (N, K) fp32", 18.6), (33, "rho (N, K) fp32", 28.4)):
        drawing.tensor(PARAMETER, (2, y, 13.5, 11), name, part, tile)
        drawing.arrow(PARAMETER, 15.7, y + 5.5, 24.3, end)
    drawing.write(71.3, 22.4 - 3.1 * splits, f"partial {result.split()[0]}, fp32")
    for split in range(splits):
        drawing.box(RESULT, 64.5, 23.8 - 3.1 * (splits - split), 13.5, 2.7, f"split {split}: 1 MB")
    drawing.arrow(RESULT, 56, 28.4 if weight_first else 12.5, 64.3, 21.5)
    drawing.arrow(RESULT, 71.2, 23.6, 71.2, 28.2)
    drawing.write(70.2, 26, "the last adds\nthem in order", ha="right")
    drawing.box(RESULT, 64.5, 28.4, 13.5, 5, f"{result}\nbf16, 0.5 MB")


def draw_forward() -> None:
    conclusion = "Per weight: 8 bytes read; with 64 rows 0.25 for partial sums, and 2 of x from the L2 cache"
    drawing = Drawing(54, "Forward, single pass: W is drawn where it is multiplied", ALL, conclusion)
    draw_product(drawing, "W", "x", "y", columns=128, weight_first=False)
    part, tile = (0.5, 0.4, 0.5, 0.12), (0.5, 0.4, 0.18, 0.12)
    draw_traffic(drawing, "x (M, K) bf16", "y (M, N)", part, tile, splits=2, weight_first=False)
    drawing.box(SUM, 36.4, 38.4, 19.4, 5, "sum of log2 sigma,\nsum of squares")
    drawing.box(RESULT, 64.5, 38.4, 13.5, 5, "partial KL: 4 B\na program")
    drawing.arrow(RESULT, 56, 40.9, 64.3, 40.9)
    drawing.save("forward")


def draw_samples() -> None:
    """Thirty-two samples of 16 rows: what a program does, and which programs are neighbours."""
    title = "Several samples: mu and sigma once, a W for each sample"
    conclusion = "Per weight, for all 32 samples: 8 bytes from memory; 24, and 16 of x, from the L2 cache"
    drawing = Drawing(64, title, ALL, conclusion)
    drawing.program(37, 37, "one program, 4 warps: 8 samples of 16 rows")
    for y, name, end in ((19.6, "mu (N, K) fp32", 21.4), (32.4, "rho (N, K) fp32", 30.6)):
        drawing.tensor(PARAMETER, (2, y, 13.5, 9), name, (0, 0.4, 1, 0.12), (0.25, 0.4, 0.08, 0.12))
        drawing.arrow(PARAMETER, 15.7, y + 4.5, 22.4, end)
    drawing.write(8.7, 7.2, "8 of x (32, 16, K) bf16")
    for i in range(8):
        band = (2, 8.4 + 0.95 * i, 13.5, 0.8)
        style = {"fc": ACTIVATION.fill, "ec": ACTIVATION.edge, "lw": 0.8}
        drawing.axes.add_patch(Rectangle(band[:2], *band[2:], **style, alpha=0.35))
        drawing.axes.add_patch(Rectangle((5.4, band[1]), 1.1, 0.8, **style))
    drawing.arrow(PLAIN, 6.4, 12.1, 9.4, 12.1, "->")
    drawing.arrow(ACTIVATION, 15.7, 10.6, 49.2, 10.6)
    drawing.box(ACTIVATION, 49.4, 8.2, 7.2, 4.8, "$x^T$: 1 KB\na sample")
    drawing.arrow(ACTIVATION, 53, 13.2, 53, 15.2)
    drawing.box(PARAMETER, 22.6, 17.8, 6, 7.2, "mu\n64 x 32\n8 KB")
    drawing.box(PARAMETER, 22.6, 27, 6, 7.2, "rho\n64 x 32\n8 KB")
    drawing.box(SUM, 22.6, 36.2, 14.8, 4.6, "KL: by the programs\nof samples 0 to 7")
    drawing.box(PARAMETER, 30.6, 15.4, 4.8, 18.8, "mu\n+\nsigma\n*")
    for y in (21.4, 30.6):
        drawing.arrow(PARAMETER, 28.8, y, 30.4, y)
    for y, sample in ((15.4, "0"), (20.9, "1"), (29.8, "7")):
        drawing.box(NOISE, 35.8, y, 5, 4.4, f"eps {sample}")
        drawing.arrow(NOISE, 41, y + 2.2, 42.4, y + 2.2)
        drawing.box(SAMPLE, 42.6, y, 5, 4.4, f"$W_{sample}$")
        drawing.arrow(SAMPLE, 47.8, y + 2.2, 49.2, y + 2.2)
        drawing.box(SUM, 49.4, y, 7.2, 4.4, f"$y_{sample}^T$\n64 x 16")
        drawing.arrow(RESULT, 56.8, y + 2.2, 64.3, y + 2.2)
    for x in (38.3, 45.1, 53):
        drawing.write(x, 27.5, "...")
    drawing.write(71.3, 13.6, "y (32, 16, N) bf16, 4 MB")
    drawing.box(RESULT, 64.5, 15.4, 13.5, 18.8, "8 of 32 samples,\n64 of N outputs:\n16 KB")
    drawing.box(RESULT, 64.5, 36.2, 13.5, 4.6, "partial KL: 4 B")
    drawing.arrow(RESULT, 37.6, 38.5, 64.3, 38.5)
    draw_neighbours(drawing)
    drawing.save("samples")


def draw_neighbours(drawing: Drawing) -> None:
    """Programs in the order of their numbers."""
    drawing.write(1.5, 45, "Programs in the order of their numbers", ha="left", weight="bold")
    shared = Kind("#e4eff8", "#1f5f99")
    for tile in range(2):
        x = 2 + 36 * tile
        for group in range(4):
            first = 8 * group
            text = f"samples\n{first} to {first + 7}"
            drawing.box(shared if group else PARAMETER, x + 8.6 * group, 46.8, 8, 4.8, text)
        drawing.write(x + 16.9, 53.2, f"tile {tile}: the first reads it, the others find it in L2")
    drawing.write(76, 49.2, "...")


def draw_pair() -> None:
    """The forward kernel's two products, and what becomes of them."""
    operands = SAMPLE._replace(legend="operands")
    legend = [PARAMETER, NOISE, operands, ACTIVATION, SUM, RESULT]
    conclusion = "Per weight: 8 bytes read; with 64 rows 1 for both products, and 2 of x from the L2 cache"
    drawing = Drawing(66, '"local" and "flipout", forward: two products of one tile', legend, conclusion)
    drawing.program(37, 51, 'one program, 4 warps; sizes of "local"')
    part, tile = (0.25, 0.4, 0.25, 0.12), (0.25, 0.4, 0.09, 0.12)
    for y, name in ((9.4, "mu (N, K) fp32"), (37.8, "rho (N, K) fp32")):
        drawing.tensor(PARAMETER, (2, y, 13.5, 9), name, part, tile)
        drawing.arrow(PARAMETER, 15.7, y + 4.5, 24.3, y + 4.5)
        drawing.box(PARAMETER, 24.5, y + 0.4, 8.2, 8.2, f"{name.split()[0]}\n16 KB")
        drawing.arrow(PARAMETER, 32.9, y + 4.5, 36.2, y + 4.5)
        drawing.arrow(operands, 44.8, y + 4.5, 47.4, y + 4.5)
    drawing.box(operands, 36.4, 9.8, 8.2, 8.2, "mu\n64 x 64\nbf16")
    drawing.box(operands, 36.4, 38.2, 8.2, 8.2, "sigma², or\nsigma eps\nbf16")
    drawing.box(SUM, 47.6, 9.8, 8.2, 8.2, "$m^T$\n64 x 64\nfp32")
    drawing.box(SUM, 47.6, 38.2, 8.2, 8.2, "$v^T$\n64 x 64\nfp32")
    drawing.tensor(ACTIVATION, (2, 22.4, 13.5, 4), "x (M, K) bf16", (0.25, 0, 0.25, 1), (0.25, 0, 0.09, 1))
    drawing.arrow(ACTIVATION, 15.7, 24.4, 47.4, 24.4)
    drawing.box(ACTIVATION, 47.6, 21.8, 8.2, 5.2, "$x^T$\n8 KB")
    drawing.arrow(ACTIVATION, 51.7, 21.6, 51.7, 18.2)
    drawing.arrow(ACTIVATION, 51.7, 27.2, 51.7, 29.8)
    drawing.box(operands, 47.6, 30, 8.2, 5.2, "x², or x\nwith signs r")
    drawing.arrow(operands, 51.7, 35.4, 51.7, 38)
    drawing.box(NOISE, 24.5, 28.2, 8.2, 7.2, 'eps, r:\n"flipout"\nonly')
    drawing.arrow(NOISE, 32.9, 33.6, 36.2, 39.4)
    drawing.arrow(NOISE, 32.9, 31.4, 47.4, 32.4)
    drawing.box(SUM, 36.4, 49.4, 19.4, 4.8, "sum of log2 sigma,\nsum of squares")
    drawing.box(RESULT, 64.5, 49.4, 13.5, 4.8, "partial KL: 4 B\na program")
    drawing.arrow(RESULT, 56, 51.8, 64.3, 51.8)
    drawing.write(71.3, 9, "m and v, fp32")
    for split in range(4):
        drawing.box(RESULT, 64.5, 10.4 + 3.1 * split, 13.5, 2.7, f"split {split}: 2 MB")
    drawing.arrow(RESULT, 56, 13.9, 64.3, 15.4)
    drawing.arrow(RESULT, 56, 42.3, 64.3, 21.2)
    drawing.box(NOISE, 64.5, 27, 13.5, 6.8, "_combine_kernel:\nadds in order,\ndraws zeta or s")
    drawing.arrow(RESULT, 71.2, 23, 71.2, 26.8)
    drawing.arrow(RESULT, 71.2, 34, 71.2, 36.4)
    drawing.box(RESULT, 64.5, 36.6, 13.5, 4.8, "y (M, N)\nbf16, 0.5 MB")
    drawing.box(RESULT, 64.5, 41.8, 13.5, 4.8, 'slope: "local",\nbf16, 0.5 MB')
    drawing.save("pair")


def draw_backward_input() -> None:
    conclusion = "Per weight: 8 bytes read; with 64 rows 0.5 for partial sums, and 2 of dY from the L2 cache"
    drawing = Drawing(54, "dX, single pass: the same W, drawn again", ALL, conclusion)
    draw_product(drawing, "W^T", "dY", "dX")
    draw_traffic(drawing, "dY (M, N) bf16", "dX (M, K)", (0.4, 0.25, 0.09, 0.25), (0.4, 0.25, 0.09, 0.1))
    drawing.save("dx")


def draw_backward_weight() -> None:
    conclusion = "Per weight: 8 bytes read, 8 written; with 64 rows, 2 of x and dY from the L2 cache"
    legend = [PARAMETER, NOISE, ACTIVATION, SUM, RESULT]
    drawing = Drawing(62, "dmu and drho: dL/dW stays in registers", legend, conclusion)
    drawing.program(37, 47.5, "one program, 8 warps: 128 x 128 weights")
    for y, name, x, end in ((9, "x (M, K) bf16", 0.4, 38.8), (20, "dY (M, N) bf16", 0.3, 27.8)):
        drawing.tensor(ACTIVATION, (2, y, 13.5, 4.5), name, (x, 0, 0.3, 1), (x, 0, 0.3, 0.4))
        drawing.arrow(ACTIVATION, 15.7, y + 2.2, end, y + 2.2)
    drawing.box(ACTIVATION, 39, 8.6, 12.8, 5, "x\n64 x 128: 16 KB")
    drawing.box(ACTIVATION, 28, 15.6, 8, 12.8, "$dY^T$\n128 x 64\n16 KB")
    for i in range(4):
        drawing.box(SUM, 39 + 3.2 * i, 15.6, 3.2, 12.8, str(i))
    drawing.write(45.4, 29.6, "dL/dW, fp32, four pieces")
    drawing.arrow(ACTIVATION, 36.2, 22.2, 38.8, 22.2)
    drawing.arrow(ACTIVATION, 45.4, 13.8, 45.4, 15.4)
    drawing.write(69, 18, "first the product over the\nbatch, 64 rows a step, the\nnext two on their way")
    drawing.write(69, 26.5, "then the rest, a piece of\n128 x 32 at a time, so\nthat it fits the registers")
    for i, (name, kind) in enumerate({"mu": PARAMETER, "rho": PARAMETER, "eps": NOISE, "dL/dW": SUM}.items()):
        drawing.box(kind, 23.4 + 7.4 * i, 37, 6.4, 11, f"{name}\npiece 2")
    drawing.arrow(SUM, 47, 30.6, 47, 36.8)
    part, tile = (0.4, 0.3, 0.3, 0.4), (0.55, 0.3, 0.075, 0.4)
    for i, name in enumerate(("mu (N, K)", "rho (N, K)")):
        y = 35 + 10.5 * i
        drawing.tensor(PARAMETER, (2, y, 13.5, 7), name, part, tile)
        drawing.tensor(RESULT, (64.5, y, 13.5, 7), "d" + name, part, tile)
        drawing.arrow(RESULT, 52.2, 40.5 + 4 * i, 64.3, y + 3.5)
        drawing.write(61.2, 36.5 + 14.7 * i, "16 KB", color=RESULT.edge)
        drawing.write(18.2, 36.7 + 15.5 * i, "16 KB", color=PARAMETER.edge)
    drawing.arrow(PARAMETER, 15.7, 38.5, 23.2, 41)
    drawing.arrow(PARAMETER, 15.7, 50.9, 32.5, 48.3)
    drawing.save("dmu-drho")


def draw_backward_pair() -> None:
    """dmu and drho of several samples of "flipout"."""
    conclusion = "Per weight: 8 bytes read, 8 written; for each sample of 64 rows 6 from the L2 cache"
    legend = [PARAMETER, NOISE, ACTIVATION._replace(legend="x, dY and second: read"), SUM, RESULT]
    drawing = Drawing(66, "dmu and drho of a pair of products, several samples", legend, conclusion)
    drawing.program(37, 49.5, "one program, 8 warps: 64 x 128 weights")
    for y, prime, sums in ((8.4, "", "G: goes on over\nall samples"), (22.9, "'", "H: of one\nsample")):
        for below, name, x, end in ((0, "x", 0.4, 32.8), (7.6, "dY", 0.3, 24.2)):
            sides = "(S, M, K)" if name == "x" else "(S, M, N)"
            drawing.tensor(
                ACTIVATION, (2, y + below, 13.5, 3.6), f"{name}{prime} {sides}", (x, 0, 0.3, 1), (x, 0, 0.3, 0.5)
            )
            drawing.arrow(ACTIVATION, 15.7, y + below + 1.8, end, y + below + 1.8)
        drawing.box(ACTIVATION, 33, y, 12.8, 3.6, f"x{prime}: 16 KB")
        drawing.box(ACTIVATION, 24.4, y + 5.4, 6.8, 6.4, f"$dY{prime}^T$\n8 KB")
        drawing.box(SUM, 33, y + 5.4, 12.8, 6.4, sums)
        drawing.arrow(ACTIVATION, 31.4, y + 8.6, 32.8, y + 8.6)
        drawing.arrow(ACTIVATION, 39.4, y + 3.8, 39.4, y + 5.2)
    drawing.box(NOISE, 24.4, 36.6, 6.8, 5.6, "eps of a\nsample")
    drawing.box(SUM, 33, 36.6, 12.8, 5.6, "sum of H eps,\nfour pieces")
    drawing.arrow(NOISE, 31.4, 39.4, 32.8, 39.4)
    drawing.arrow(SUM, 39.4, 34.8, 39.4, 36.4)
    drawing.box(PARAMETER, 24.4, 46, 6.8, 5, "mu: 8 KB")
    drawing.box(PARAMETER, 33, 46, 6.8, 5, "rho: 8 KB")
    drawing.box(SUM, 43.6, 46, 12.8, 5, "a piece at\na time")
    drawing.arrow(PARAMETER, 40, 48.5, 43.4, 48.5)
    drawing.arrow(SUM, 43.6, 42.4, 46.2, 45.8)
    drawing.axes.plot((46, 51), (17, 17), color=SUM.edge, lw=1.5)
    drawing.arrow(SUM, 51, 16.7, 51, 45.8)
    part, tile = (0.4, 0.3, 0.3, 0.3), (0.55, 0.3, 0.075, 0.3)
    for y, name in ((37, "mu (N, K)"), (47.4, "rho (N, K)")):
        drawing.tensor(PARAMETER, (2, y, 13.5, 7), name, part, tile)
        drawing.tensor(RESULT, (64.5, y, 13.5, 7), "d" + name, part, tile)
        drawing.arrow(RESULT, 56.6, 48.5, 64.3, y + 3.5)
    drawing.arrow(PARAMETER, 15.7, 40.5, 24.2, 47.4)
    drawing.arrow(PARAMETER, 15.7, 52.4, 34.6, 51.2)
    drawing.write(69, 14, "for each sample both\nproducts over its rows,\n64 a step")
    drawing.write(69, 26, "after the last one\nmu and rho are read")
    drawing.save("pair-backward")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    forward = draw_noise, draw_sampling, draw_forward, draw_samples, draw_pair
    for draw in (*forward, draw_backward_input, draw_backward_weight, draw_backward_pair):
        draw()
