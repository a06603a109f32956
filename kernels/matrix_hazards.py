"""Find races between asynchronous matrix products and what a kernel does meanwhile, in its PTX.

wgmma runs beside the program until wgmma.wait_group says that it is done. Two things go wrong unseen (the interpreter
has no wgmma, and a GPU shows it only where its tensor cores lag behind):

- An operand in registers is written too early, which PTX leaves undefined (PTX ISA 8.5, wgmma.mma_async). Triton 3.6
  does so in a pipelined loop that computes this operand: 12 % error in SD1.5's factored UNet on an H200, and none in
  small layers.
- Shared memory that another warp group still multiplies is filled anew: a wait holds for its own four warps only, so
  a barrier must stand between it and the next copy.

Used where kernels are cross-compiled, by the tests and benchmarks/compiled_resources.py.
"""

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

REGISTER = re.compile(r"%\w+")
GROUP = re.compile(r"\{[^}]*\}")
LABEL = re.compile(r"^(?P<name>[$\w]+):")
GUARD = re.compile(r"^@!?%?\w+\s+")
BRANCH = re.compile(r"^bra(?:\.uni)?\s+(?P<to>[$\w]+)")
WAIT = re.compile(r"^wgmma\.wait_group\.sync\.aligned\s+(?P<left>\d+)")
COMMIT = "wgmma.commit_group"
PRODUCT = "wgmma.mma_async"
COPIES = ("cp.async.bulk.tensor", "cp.async.ca", "cp.async.cg")
BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync")
# These read their first operand instead of writing it.
READERS = ("st.", "bar", "mbarrier.", "cp.", "fence", "wgmma.", "prefetch", "red.", "ret", "bra", "membar")
# More groups than any kernel keeps in flight tell nothing new.
MOST_GROUPS = 64

State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction without its guard: registers that it writes, those that a product reads, what may follow it."""

    text: str
    writes: frozenset[str]
    operand: frozenset[str]
    next: tuple[int, ...]


def overwritten_operands(ptx: str) -> list[str]:
    """Return the instructions that write registers of a product that may not be done, in order, each once."""
    code = parse_ptx(ptx)
    found: set[int] = set()
    for start, product in enumerate(code):
        if product.operand:
            found |= _writers(code, start)
    return [code[number].text for number in sorted(found)]


def unguarded_copies(ptx: str) -> list[str]:
    """Return the copies into shared memory that a wait for products reaches without a barrier, in order, each once."""
    code = parse_ptx(ptx)
    found: set[int] = set()

    def follow(number: int) -> Iterable[int]:
        if code[number].text.startswith(COPIES):
            found.add(number)
        return () if code[number].text.startswith((*COPIES, *BARRIERS)) else code[number].next

    for instruction in code:
        if WAIT.match(instruction.text):
            _walk(instruction.next, follow)
    return [code[number].text for number in sorted(found)]


def parse_ptx(ptx: str) -> list[Instruction]:
    """Return the instructions of the PTX of one kernel."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for raw in ptx.splitlines():
        text = raw.split("//")[0].strip()
        label = LABEL.match(text)
        if label:
            labels[label["name"]] = len(lines)
        elif text.endswith(";") and not text.startswith("."):
            lines.append(text.rstrip(";"))
    return [_instruction(text, number, len(lines), labels) for number, text in enumerate(lines)]


def _instruction(text: str, number: int, count: int, labels: dict[str, int]) -> Instruction:
    guarded = GUARD.match(text)
    body = text[guarded.end() :] if guarded else text
    following: tuple[int, ...] = (number + 1,) if number + 1 < count else ()
    branch = BRANCH.match(body)
    if branch:
        target = labels.get(branch["to"], count)
        following = ((target,) if target < count else ()) + (following if guarded else ())
    elif body.startswith("ret"):
        following = following if guarded else ()
    groups = GROUP.findall(body)
    # The sum is the first group of a product; an operand in shared memory is a descriptor, one in registers a second.
    operand = groups[1] if body.startswith(PRODUCT) and len(groups) > 1 else ""
    return Instruction(body, _written(body), frozenset(REGISTER.findall(operand)), following)


def _written(body: str) -> frozenset[str]:
    if body.startswith(READERS):
        return frozenset()
    operands = body.partition(" ")[2].strip()
    target = GROUP.match(operands)
    return frozenset(REGISTER.findall(target.group() if target else operands.partition(",")[0]))


def _writers(code: list[Instruction], start: int) -> set[int]:
    """Follow every path from the product at `start` until a wait covers it, and collect who writes its operand."""
    found: set[int] = set()

    def follow(state: tuple[int, int]) -> Iterable[tuple[int, int]]:
        # Where we are, and how many groups were committed since: the product is in the first of them.
        number, committed = state
        instruction = code[number]
        wait = WAIT.match(instruction.text)
        if wait and committed > int(wait["left"]):
            return ()
        if instruction.writes & code[start].operand:
            found.add(number)
        committed = min(committed + instruction.text.startswith(COMMIT), MOST_GROUPS)
        return ((following, committed) for following in instruction.next)

    _walk([(following, 0) for following in code[start].next], follow)
    return found


def _walk(starts: Iterable[State], follow: Callable[[State], Iterable[State]]) -> None:
    """Visit every state that can be reached, each once."""
    waiting = list(starts)
    seen: set[State] = set()
    while waiting:
        state = waiting.pop()
        if state not in seen:
            seen.add(state)
            waiting += follow(state)
