"""A compiled kernel's machine code: its instructions, its loops, its resources. Needs no GPU."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from graphlib import TopologicalSorter
from itertools import islice
from typing import Any, NamedTuple

import triton

GLOBAL_LOADS = ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")
ASYNCHRONOUS_LOADS = GLOBAL_LOADS[1:]  # to shared memory, while the thread goes on
LOCAL_MEMORY = ("LDL", "STL")
INSTRUCTION_BYTES = 16
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")


class Instruction(NamedTuple):
    """One line of a disassembly; `target` is where it jumps to."""

    address: int
    opcode: str
    text: str
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def ends_block(self) -> bool:
        return self.name in ("BRA", "CALL", "EXIT", "RET")

    @property
    def conditional(self) -> bool:
        return self.text.startswith("@") or ".DIV" in self.opcode or bool(re.search(r"\bU?P\d", self.text))

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow. After a call it can: what does not return is the program's end."""
        return self.conditional or self.name not in ("BRA", "EXIT", "RET")


Code = list[Instruction]


class Mark(NamedTuple):
    """An instruction that there is one of for so many normals or sigmas."""

    opcode: str
    results: int


NORMALS = Mark("MUFU.SIN", 2)  # each sine is half of a Box-Muller pair
SIGMAS = Mark("MUFU.EX2", 1)


class Counts(NamedTuple):
    """What a thread does in a piece of code.

    Attributes:
        marks: results that tell how many weights it works on: see `Mark`.
        instructions: without NOPs, which wait for what the hardware needs time for.
        special: results of the special-function unit: logarithms, exponentials, sines, square roots, reciprocals.
    """

    marks: int = 0
    instructions: int = 0
    special: int = 0

    def __add__(self, other: object) -> "Counts":
        return (
            Counts(*(a + b for a, b in zip(self, other, strict=True))) if isinstance(other, Counts) else NotImplemented
        )


class Resources(NamedTuple):
    """What a thread and a program have: registers, bytes of stack, bytes of shared memory."""

    registers: int
    stack: int
    shared: int


def resources(kernel: Any) -> Resources:
    """Of a kernel that Triton compiled."""
    usage = _run("cuobjdump", "-res-usage", data=kernel.asm["cubin"])
    registers, stack = (int(number) for number in re.findall(r"\b(?:REG|STACK):(\d+)", usage))
    return Resources(registers, stack, kernel.metadata.shared)


def disassemble(kernels: Sequence[Any]) -> list[Code]:
    """The instructions of kernels that Triton compiled for one target, padding at their ends left out.

    All at once, because the disassembler takes longer to start than to disassemble.
    """
    texts = [_text(kernel.asm["cubin"]) for kernel in kernels]
    architecture = kernels[0].metadata.target.arch
    suffix = "a" if architecture >= 90 else ""
    listing = _run("nvdisasm", "--binary", f"SM{architecture}{suffix}", data=b"".join(texts))
    instructions = iter(_instructions(listing))
    codes = []
    for text in texts:
        code = list(islice(instructions, len(text) // INSTRUCTION_BYTES))
        while code and (code[-1].name == "NOP" or code[-1].target == code[-1].address):
            code.pop()
        codes.append(code)
    return codes


def _instructions(listing: str) -> Iterator[Instruction]:
    for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", listing):
        text = match[2].strip()
        opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        jump = re.search(r"0x([0-9a-f]+)$", text) if opcode.startswith(("BRA", "CALL")) else None
        yield Instruction(int(match[1], 16), opcode, text, int(jump[1], 16) if jump else None)


def _text(cubin: bytes) -> bytes:
    """The machine code in a cubin, which is an ELF file: its section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    # Of each section: where its name is, ..., where it begins, how long it is.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    begins = sections[names][4]
    (text,) = (s for s in sections if cubin.startswith(b".text.", begins + s[0]))
    return cubin[text[4] : text[4] + text[5]]


def _run(tool: str, *options: str, data: bytes) -> str:
    """Output of one of the CUDA tools that Triton ships."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def has(code: Code, names: Iterable[str]) -> bool:
    return any(instruction.name in names for instruction in code)


def count(code: Code, mark: Mark) -> Counts:
    return Counts(
        marks=mark.results * sum(instruction.opcode == mark.opcode for instruction in code),
        instructions=sum(instruction.name != "NOP" for instruction in code),
        special=sum(instruction.name == "MUFU" for instruction in code),
    )


class Flow:
    """A program's blocks and which can follow which.

    Attributes:
        blocks: what is run from its first instruction to its last.
        successors: for each block the numbers of those that can come next.
        loops: for each loop's first block the blocks of the natural loop, those of inner loops included.
    """

    def __init__(self, code: Code) -> None:
        targets = {instruction.target for instruction in code}
        begins = [i for i, x in enumerate(code) if i == 0 or x.address in targets or code[i - 1].ends_block]
        self.blocks = [code[begin:end] for begin, end in zip(begins, [*begins[1:], len(code)], strict=True)]
        self.successors = self._find_successors()
        self._predecessors: list[set[int]] = [set() for _ in self.blocks]
        for number, following in enumerate(self.successors):
            for successor in following:
                self._predecessors[successor].add(number)
        self._back_edges = self._find_back_edges()
        self.loops = {head: self._loop(head, tails) for head, tails in self._back_edges.items()}

    def code(self, numbers: Iterable[int]) -> Code:
        """The instructions of some blocks, in the order of the program."""
        return [instruction for number in sorted(numbers) for instruction in self.blocks[number]]

    def after(self, loop: set[int]) -> set[int]:
        """The blocks that can follow a loop at once."""
        return set().union(*(self.successors[number] for number in loop)) - loop

    def paths(self, begin: set[int], mark: Mark) -> dict[int, Counts]:
        """Of the ways from one of the blocks to the program's end, by how many marks they have, the shortest.

        Each loop on the way is gone through at most once.
        """
        following = list(self.successors)
        for head, tails in self._back_edges.items():
            for tail in tails:
                following[tail] = following[tail] - {head} | self.after(self.loops[head])
        shortest: dict[int, dict[int, Counts]] = {}
        for number in TopologicalSorter(dict(enumerate(following))).static_order():
            here = count(self.blocks[number], mark)
            rest = [counts for successor in following[number] for counts in shortest[successor].values()]
            if not rest or self.blocks[number][-1].name == "EXIT":
                rest.append(Counts())
            shortest[number] = _shortest(here + counts for counts in rest)
        return _shortest(counts for number in begin for counts in shortest[number].values())

    def _find_successors(self) -> list[set[int]]:
        at: dict[int | None, int] = {block[0].address: number for number, block in enumerate(self.blocks)}
        exits = {number for number, block in enumerate(self.blocks) if block[-1].name == "EXIT"}
        successors: list[set[int]] = []
        for number, block in enumerate(self.blocks):
            target = block[-1].target
            following = {at[target]} if target in at else set()
            if block[-1].falls_through and number + 1 < len(self.blocks):
                following.add(number + 1)
            successors.append(following)
        # What cannot reach the program's end is a subroutine, left by RET: a call of it goes on behind it.
        ending = exits
        while True:
            before = ending
            ending = ending | {number for number, following in enumerate(successors) if following & ending}
            if ending == before:
                break
        return [{successor for successor in following if successor in ending} for following in successors]

    def _find_back_edges(self) -> dict[int, set[int]]:
        """The blocks that jump back to a block through which every way to them leads, by that block."""
        everything = set(range(len(self.blocks)))
        dominators = [{0} if number == 0 else everything for number in everything]
        before: list[set[int]] = []
        while dominators != before:
            before = list(dominators)
            for number in range(1, len(self.blocks)):
                ways = [dominators[p] for p in self._predecessors[number]]
                dominators[number] = {number} | (set.intersection(*ways) if ways else set())
        edges: dict[int, set[int]] = {}
        for tail, following in enumerate(self.successors):
            for head in following & dominators[tail]:
                edges.setdefault(head, set()).add(tail)
        return edges

    def _loop(self, head: int, tails: set[int]) -> set[int]:
        members, pending = {head}, list(tails)
        while pending:
            number = pending.pop()
            if number not in members:
                members.add(number)
                pending += self._predecessors[number]
        return members


def _shortest(ways: Iterable[Counts]) -> dict[int, Counts]:
    best: dict[int, Counts] = {}
    for counts in ways:
        known = best.get(counts.marks)
        if known is None or counts.instructions < known.instructions:
            best[counts.marks] = counts
    return best
