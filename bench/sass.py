"""A compiled kernel's machine code: its instructions, its loops, its resources. Needs no GPU."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import triton

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
LOCAL_MEMORY = ("LDL", "STL")


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
        return self.name in ("BRA", "BRX", "EXIT", "RET")

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow: it does unless this is an unconditional jump."""
        return not self.ends_block or self.text.startswith("@") or bool(re.search(r"\bU?P\d", self.text))


class Resources(NamedTuple):
    """What a thread and a program have: registers, bytes of stack, bytes of shared memory."""

    registers: int
    stack: int
    shared: int


Loop = list[Instruction]


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    """Output of one of the CUDA tools that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = getattr(triton.knobs.nvidia, name).path
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> Resources:
    """Of a kernel that Triton compiled."""
    usage = _tool("cuobjdump", "-res-usage", cubin=kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return Resources(registers, stack, kernel.metadata.shared)


def disassemble(kernel: Any) -> list[Instruction]:
    """The instructions of a kernel that Triton compiled, padding at its end left out."""
    instructions = []
    for match in re.finditer(
        r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", _tool("cuobjdump", "-sass", cubin=kernel.asm["cubin"])
    ):
        text = match[2].strip()
        opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        jump = re.search(r"0x([0-9a-f]+)$", text) if opcode.startswith("BRA") else None
        instructions.append(Instruction(int(match[1], 16), opcode, text, int(jump[1], 16) if jump else None))
    while instructions and instructions[-1].name in ("NOP", "BRA"):
        instructions.pop()
    return instructions


def loops(code: list[Instruction]) -> list[Loop]:
    """The natural loops, outer ones with the inner ones that they hold: a jump back to a block that dominates it."""
    targets = {instruction.target for instruction in code}
    cuts = [
        i for i, instruction in enumerate(code) if i == 0 or instruction.address in targets or code[i - 1].ends_block
    ]
    blocks = [code[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(code)], strict=True)]
    at = {block[0].address: number for number, block in enumerate(blocks)}
    successors: list[set[int]] = []
    for number, block in enumerate(blocks):
        following = {at[block[-1].target]} if block[-1].target in at else set()  # type: ignore[index]
        if block[-1].falls_through and number + 1 < len(blocks):
            following.add(number + 1)
        successors.append(following)
    predecessors = [{p for p, following in enumerate(successors) if n in following} for n in range(len(blocks))]
    found = []
    for head, tails in _back_edges(successors, predecessors).items():
        members, pending = {head}, list(tails)
        while pending:
            number = pending.pop()
            if number not in members:
                members.add(number)
                pending += predecessors[number]
        found.append([instruction for number in sorted(members) for instruction in blocks[number]])
    return found


def _back_edges(successors: list[set[int]], predecessors: list[set[int]]) -> dict[int, set[int]]:
    """Loop heads and the blocks that jump back to them."""
    everything = set(range(len(successors)))
    dominators = [{0} if number == 0 else everything for number in everything]
    while True:
        before = list(dominators)
        for number in range(1, len(successors)):
            common = [dominators[p] for p in predecessors[number]]
            dominators[number] = {number} | (set.intersection(*common) if common else set())
        if dominators == before:
            break
    edges: dict[int, set[int]] = {}
    for tail, following in enumerate(successors):
        for head in following & dominators[tail]:
            edges.setdefault(head, set()).add(tail)
    return edges


def count(code: list[Instruction], wanted: Callable[[Instruction], bool]) -> int:
    return sum(map(wanted, code))


def special_functions(code: list[Instruction]) -> int:
    """Results of the special-function unit: logarithms, exponentials, sines, square roots, reciprocals."""
    return count(code, lambda instruction: instruction.name == "MUFU")


def normals(code: list[Instruction]) -> int:
    """Normals that a thread draws: each sine is half of a Box-Muller pair."""
    return 2 * count(code, lambda instruction: instruction.opcode == "MUFU.SIN")


def mix(code: list[Instruction]) -> Counter[str]:
    return Counter(instruction.name for instruction in code)
