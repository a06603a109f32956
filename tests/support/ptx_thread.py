"""One thread of a compiled kernel, followed instruction by instruction without a GPU, for what assembly does.

Only what the kernels here compile to is known. Products of the tensor cores are taken from `multiply`, barriers and
copies to shared memory are passed by: the caller knows which blocks arrive.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What neither computes nor branches, for one thread.
PASSED = ("bar.", "mbarrier.", "cp.async", "wgmma.fence", "wgmma.commit", "wgmma.wait", "cvta.", "//")
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
COMPUTE: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "max": max,
}
Multiply = Callable[[int, int, int], np.ndarray]


class PtxThread:
    """Runs one thread: `parameters` by their number, `memory` all tensors it may touch, CPU and contiguous.

    `multiply` takes a product's two descriptors and how many sums the thread has of it, and returns what it adds to
    them.
    """

    def __init__(self, ptx: str, parameters: dict[int, int], memory: Sequence[Tensor], multiply: Multiply) -> None:
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
        body = re.sub(r"waitLoop:.*?waitLoop;", "", re.sub(r"//[^\n]*", "", body), flags=re.DOTALL)
        self.code = [part.strip() for part in re.split(r"[;\n]", body)]
        self.code = [re.sub(r"^\{\s*(?=\.reg|$)|^\}$", "", part).strip() for part in self.code]
        self.code = [part for part in self.code if part and not part.startswith((".", "//"))]
        self.labels = {part[:-1]: at for at, part in enumerate(self.code) if part.endswith(":")}
        self.parameters, self.multiply = parameters, multiply
        self.memory = [(tensor.data_ptr(), tensor.view(-1).view(torch.uint8).numpy()) for tensor in memory]
        self.values: dict[str, int] = {}

    def run(self, thread: int, program: int, programs: int) -> None:
        """Follow thread `thread` of program `program` to its end."""
        self.values = {"%tid.x": thread, "%ctaid.x": program, "%nctaid.x": programs, "global_smem": 0}
        at = 0
        while self.code[at] != "ret":
            words = self.code[at].split(None, 1)
            at += 1
            if words[0].startswith("@"):
                negated, name = words[0].startswith("@!"), words[0].lstrip("@!")
                if bool(self.values.get(name, 0)) == negated:
                    continue
                words = words[1].split(None, 1)
            if words[0] in ("bra", "bra.uni"):
                at = self.labels[words[1].strip()]
            elif not words[0].endswith(":") and not words[0].startswith(PASSED):
                self._step(words[0], words[1])

    def _step(self, name: str, rest: str) -> None:
        operands = [part.strip() for part in re.findall(r"\s*(\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*)", rest) if part.strip()]
        if name.startswith("wgmma.mma_async"):
            registers = _registers(operands[0])
            sums = self.multiply(self._read(operands[1]), self._read(operands[2]), len(registers))
            old = np.array([self.values[register] for register in registers], np.uint32).view(np.float32)
            self.values.update(zip(registers, (old + sums).astype(np.float32).view(np.uint32).tolist(), strict=True))
        elif name.startswith("ld.param"):
            self.values[operands[0]] = self.parameters[int(operands[1].rstrip("]").rpartition("_")[2])]
        elif name.startswith(("ld.global", "st.global")):
            self._access(name, *operands)
        elif name.startswith("elect"):
            self.values[operands[0].partition("|")[2]] = 0
        elif operands[0].startswith("{") or operands[-1].startswith("{"):
            low, high = _registers(operands[0])
            word = self._read(operands[1])
            self.values[low], self.values[high] = word & 0xFFFF, word >> 16
        else:
            self.values[operands[0]] = self._compute(name.split("."), [self._read(part) for part in operands[1:]])

    def _read(self, operand: str) -> int:
        if operand in self.values:
            return self.values[operand]
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        # Addresses of descriptors, which are passed by.
        return 0 if operand.startswith(("%", "_")) else int(operand, 0)

    def _access(self, name: str, first: str, second: str) -> None:
        load = name.startswith("ld")
        registers, address = _registers(first if load else second), second if load else first
        start = self._read(address.strip("[] ").partition("+")[0].strip())
        size = int(name[-2:]) // 8
        begin, found = next((begin, found) for begin, found in self.memory if begin <= start < begin + len(found))
        assert (start - begin) % (size * len(registers)) == 0, "the address is not aligned"
        for number, register in enumerate(registers):
            piece = slice(start - begin + number * size, start - begin + (number + 1) * size)
            assert piece.stop <= len(found), "outside of the tensor"
            if load:
                self.values[register] = int.from_bytes(found[piece].tobytes(), "little")
            else:
                found[piece] = np.frombuffer(self.values[register].to_bytes(size, "little"), np.uint8)

    @staticmethod
    def _compute(name: list[str], given: list[int]) -> int:
        kind, signed = name[0], name[-1].startswith("s")
        width = 64 if name[-1].endswith("64") or "wide" in name else 32
        bits = int(name[-1][1:]) if name[-1][1:].isdigit() else 32
        if signed:
            plain = [_signed(value, bits) for value in given]
            given = [*plain[:2], _signed(given[2], 64)] if "wide" in name and len(given) == 3 else plain
        result: Any
        if kind == "shfl":
            # Of values that are the same in a whole warp, as the number of the warp.
            result = given[0]
        elif kind == "cvt":
            result = _convert(name, given)
        elif kind == "add" and name[-1] == "f32":
            result = _bits(np.float32(_float(given[0]) + _float(given[1])))
        elif kind == "setp":
            result = COMPARE[name[1]](given[0], given[1])
        elif kind == "selp":
            result = given[0] if given[2] else given[1]
        elif kind == "bfe":
            result = given[0] >> given[1] & ((1 << given[2]) - 1)
            result = _signed(result, given[2]) if signed else result
        else:
            result = COMPUTE[kind](*given)
        return int(result) & ((1 << width) - 1)


def _registers(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _float(bits: int) -> np.float32:
    return np.float32(np.array([bits], np.uint32).view(np.float32)[0])


def _bits(value: np.float32) -> int:
    return int(np.array([value], np.float32).view(np.uint32)[0])


def _convert(name: list[str], given: list[int]) -> int:
    if name[1:] == ["f32", "f16"]:
        return _bits(np.float32(np.array([given[0]], np.uint16).view(np.float16)[0]))
    if name[1] == "rn":
        element = torch.float16 if name[2] == "f16x2" else torch.bfloat16
        pair = torch.tensor([float(_float(value)) for value in reversed(given)]).to(element).view(torch.int16)
        return (int(pair[0]) & 0xFFFF) | (int(pair[1]) & 0xFFFF) << 16
    return given[0]
