"""Sums added to a weight in the layout of the tensor cores: interpreted, and the assembly that a GPU gets instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hueshift.kernels.fragments import add_to_words, in_order, read_words, write_words
from hueshift.kernels.launch import Launch, jit, tl
from hueshift.kernels.tiles import interleave

ROWS, COLS = 16, 64
# The last piece of every row is outside, as are the last rows.
INSIDE_ROWS, INSIDE_PIECES = 13, 7


@jit
def _add_kernel(sums_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr,
                INSIDE_ROWS: tl.constexpr, INSIDE_PIECES: tl.constexpr) -> None:  # fmt: skip
    m = tl.arange(0, ROWS)
    n = tl.arange(0, COLS)
    pieces = tl.arange(0, COLS // 8)
    inside = (m < INSIDE_ROWS)[:, None] & (pieces < INSIDE_PIECES)[None, :]
    at = tl.where(inside, m[:, None] * (COLS // 8) + pieces[None, :], -1)
    words = read_words(weight_ptr.to(tl.int64), at)
    tile = in_order(tl.load(sums_ptr + m[:, None] * COLS + n[None, :]), ROWS, COLS)
    write_words(out_ptr.to(tl.int64), at, add_to_words(words, tile, weight_ptr.dtype.element_ty, ROWS, COLS))


def launch(dtype: torch.dtype) -> tuple[Launch, torch.Tensor]:
    """Return the launch on random numbers, and what its output is to be: NaN outside, where nothing may be written."""
    torch.manual_seed(0)
    weight, change = torch.randn(ROWS, COLS).to(dtype), torch.randn(ROWS, COLS) * 0.3
    weight[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 5.0]).to(dtype)
    change[0, :4] = torch.tensor([0.0, 0.0, -0.0, 0.0])
    # The sums as a product with an interleaved factor leaves them: its rows are the columns here.
    shuffled = change.t().contiguous()
    interleave(shuffled)
    out = torch.full_like(weight, float("nan"))
    want = out.clone()
    changed = torch.where(change == 0, weight, (weight.float() + change).to(dtype))
    want[:INSIDE_ROWS, : 8 * INSIDE_PIECES] = changed[:INSIDE_ROWS, : 8 * INSIDE_PIECES]
    arguments = {"sums_ptr": shuffled.t().contiguous(), "weight_ptr": weight, "out_ptr": out}
    sizes = {"ROWS": ROWS, "COLS": COLS, "INSIDE_ROWS": INSIDE_ROWS, "INSIDE_PIECES": INSIDE_PIECES}
    return Launch(_add_kernel, (1,), arguments, sizes, 1, 1), want


def interpreted(dtype: str) -> dict[str, float]:
    """Run it and count the elements whose bits are not those wanted; the interpreter cuts bfloat16 off, a bit less."""
    work, want = launch(getattr(torch, dtype))
    work.run()
    apart = (work.arguments["out_ptr"].view(torch.int16).int() - want.view(torch.int16).int()).abs()
    return {"wrong": float((apart > (dtype == "bfloat16")).sum())}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_added_in_order_and_only_inside(interpret: Callable[..., dict[str, float]], dtype: str) -> None:
    assert interpret(__file__, "interpreted", dtype=dtype)["wrong"] == 0


@pytest.mark.parametrize(
    ("dtype", "pack"), [(torch.float16, "cvt.rn.f16x2.f32"), (torch.bfloat16, "cvt.rn.bf16x2.f32")]
)
def test_the_assembly_reads_adds_and_writes_whole_pieces(
    cross_compile: Callable[..., Any], dtype: torch.dtype, pack: str
) -> None:
    found = cross_compile(launch(dtype)[0], "sm_90")
    pieces = ROWS * COLS // 8 // 32
    assert (found.accesses("ld")[16] >= pieces, found.accesses("st")[16]) == (True, pieces)
    assert found.ptx.count(pack) == 4 * pieces


def test_interleaved_rows_are_eight_neighbours_of_a_thread() -> None:
    rows = torch.arange(64.0)[:, None].repeat(1, 2)
    interleave(rows)
    # wgmma's thread t of a row holds columns 8 j + 2 t and 8 j + 2 t + 1 of every eight.
    held = [8 * j + 2 * 3 + b for j in range(4) for b in (0, 1)]
    assert rows[held, 0].tolist() == list(range(24, 32))
    assert rows[[32 + column for column in held], 0].tolist() == list(range(56, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_adds_the_same_bits(gpu: torch.device, dtype: torch.dtype) -> None:
    work, want = launch(dtype)
    moved = {name: tensor.to(gpu) for name, tensor in work.arguments.items()}
    Launch(work.kernel, work.grid, moved, work.constants, work.num_warps, work.num_stages).run()
    assert torch.equal(moved["out_ptr"].cpu().view(torch.int16), want.view(torch.int16))
