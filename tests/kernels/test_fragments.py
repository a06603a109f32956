"""Sums added to a weight in the layout of the tensor cores: interpreted, and the assembly that a GPU gets instead."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ptx_thread import PtxThread

from hueshift.kernels.fragments import add_to_words, in_order, read_words, write_words
from hueshift.kernels.launch import Launch, jit, tl
from hueshift.kernels.launch_table import LaunchConfig
from hueshift.kernels.spectral_plan import Schedule, SpectralLayer, build_tables
from hueshift.kernels.spectral_reassemble import launches
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


def make_layer(rows: int, cols: int, rank: int, offset: int, dtype: torch.dtype) -> SpectralLayer:
    """A layer of small whole numbers, of which every sum is exact up to its last rounding."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape).to(dtype)

    out = torch.full((rows, cols), float("nan"), dtype=dtype)
    return SpectralLayer(draw(rows, rank), torch.ones(rank), draw(rank, cols), draw(rows, cols), out, offset)


def tensor_core(
    packed: np.ndarray, blocks: Iterator[tuple[int, int]], thread: int, sums: int, block_cols: int
) -> Callable[[int, int, int], np.ndarray]:
    """Multiply for one thread, as wgmma does: `sums` products of 64 rows for each 16 of a block's 64 columns in depth.

    Sum i of a thread belongs to row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2
    (PTX ISA, figure of the accumulator of wgmma.mma_async.m64nNk16). Descriptors hold addresses divided by 16; blocks'
    rows take 128 bytes and lie on boundaries of their size.
    """
    warp, lane = divmod(thread, 32)
    place = {"calls": 0, "a": 0, "b": 0}

    def multiply(a: int, b: int, count: int) -> np.ndarray:
        if place["calls"] % (4 * sums) == 0:
            place["a"], place["b"] = next(blocks)
        place["calls"] += 1
        a, b = (a & 0x3FFF) * 16, (b & 0x3FFF) * 16
        k = a % 128 // 2
        assert (b % 128 // 2, b % (block_cols * 128) // 128) == (k, 0)
        i = np.arange(count)
        row = place["a"] + a % (128 * 128) // 128 + 16 * (warp % 4) + lane // 4 + 8 * (i // 2 % 2)
        col = place["b"] + 8 * (i // 4) + 2 * (lane % 4) + i % 2
        return np.asarray((packed[row, k : k + 16] * packed[col, k : k + 16]).sum(1))

    return multiply


def follow(ptx: str, work: Launch, group: Schedule, layers: list[SpectralLayer], threads: list[int]) -> None:
    """Run these threads of every program of a reassembly's launch, as compiled."""
    block_n, programs = work.constants["BLOCK_N"], work.grid[0]
    packed = work.arguments["a_source"].base.float().numpy()
    tables = [work.arguments[name] for name in ("tiles_ptr", "counts_ptr", "layers_ptr")]
    # Five parameters for each of the two descriptors come first.
    parameters = {10 + number: table.data_ptr() for number, table in enumerate(tables)}
    memory = [*tables, *(layer.base for layer in layers), *(layer.out for layer in layers)]
    for program in range(programs):
        records = group.tiles[program::programs].tolist()
        order = [(a + k * 128, b + k * block_n) for a, b, deep, *_ in records for k in range(deep)]
        for thread in threads:
            blocks = iter(order)
            multiply = tensor_core(packed, blocks, thread, 8 // work.num_warps, block_n)
            PtxThread(ptx, parameters, memory, multiply).run(thread, program, programs)
            assert next(blocks, None) is None


@pytest.mark.parametrize(("dtype", "cols", "warps"), [(torch.float16, 256, 8), (torch.bfloat16, 128, 4)])
def test_a_thread_of_the_compiled_kernel_adds_what_wgmma_gives_it(
    cross_compile: Callable[..., Any], dtype: torch.dtype, cols: int, warps: int
) -> None:
    """Sums of three, one and two blocks, tiles that end inside a block, and reads two blocks before the last."""
    torch.manual_seed(0)
    shapes, layers = [(136, 264, 130), (40, 8, 40), (72, 320, 100)], list[SpectralLayer]()
    for rows, columns, rank in shapes:
        layers.append(make_layer(rows, columns, rank, sum(layer.rank for layer in layers), dtype))
    constants = {"BLOCK_M": 128, "BLOCK_N": cols, "BLOCK_K": 64, "TMA": True, "DIRECT": True, "VECTOR": 8}
    size = sum(layer.rank for layer in layers)
    tables = build_tables(layers, size, LaunchConfig(constants, warps, 3, 1, ""))
    # What the launch before does where each shift is 1.
    for source, target, *_ in tables.scaled_blocks.tolist():
        tables.packed[target : target + 32] = tables.packed[source : source + 32]
    work = launches(tables, torch.zeros(1, size), torch.zeros(1), effective=False)[-1]
    # Four lanes share a row, and hold the row 8 below as well; with four warps also those 64 below.
    quads = [(0, 0), (2, 3), (warps - 1, 7)]
    threads = [32 * warp + 4 * quad + lane for warp, quad in quads for lane in range(4)]
    follow(cross_compile(work, "sm_90").ptx, work, tables.groups[0], layers, threads)
    places = {16 * warp + quad + below for warp, quad in quads for below in (0, 8)}
    held = {place + 64 * part for place in places for part in range(8 // warps)}
    for layer in layers:
        want = (layer.base.float() + layer.u.float() @ layer.vh.float()).to(dtype)
        mine = torch.tensor([row % 128 in held for row in range(len(want))])
        assert mine.any()
        assert torch.equal(layer.out[mine], want[mine])
        assert layer.out[~mine].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_adds_the_same_bits(gpu: torch.device, dtype: torch.dtype) -> None:
    work, want = launch(dtype)
    moved = {name: tensor.to(gpu) for name, tensor in work.arguments.items()}
    Launch(work.kernel, work.grid, moved, work.constants, work.num_warps, work.num_stages).run()
    assert torch.equal(moved["out_ptr"].cpu().view(torch.int16), want.view(torch.int16))
