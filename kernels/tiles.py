"""Work lists of the grouped launches: which output tile each program computes, and factors packed tile by tile.

One launch covers hundreds of weights of different shapes. A factor is packed as blocks of `block_rows` x `block_depth`,
each block contiguous and zero-padded, so that a kernel loads whole blocks by their number: no masks, no descriptor per
layer, and odd sizes (36 columns of conv_in, 4 rows of conv_out) cost nothing but padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """One product of a grouped launch: out [rows, cols] summed over `depth`."""

    rows: int
    cols: int
    depth: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Output tile (`row`, `col`), in blocks, of matrix number `matrix`."""

    matrix: int
    row: int
    col: int


def blocks(size: int, block: int) -> int:
    """Return how many blocks cover `size`."""
    return -(-size // block)


def order_tiles(shapes: Sequence[MatrixShape], block_rows: int, block_cols: int) -> list[Tile]:
    """Return all output tiles, those with the longest sum first.

    Long tiles first leave short ones to fill the tail of a persistent launch. Inside a matrix the shorter side runs
    fastest: the programs that run together then share the whole of one factor and few blocks of the other in L2.
    """
    order = sorted(range(len(shapes)), key=lambda number: -shapes[number].depth)
    tiles: list[Tile] = []
    for number in order:
        shape = shapes[number]
        down, across = blocks(shape.rows, block_rows), blocks(shape.cols, block_cols)
        if down <= across:
            tiles.extend(Tile(number, row, col) for col in range(across) for row in range(down))
        else:
            tiles.extend(Tile(number, row, col) for row in range(down) for col in range(across))
    return tiles


def packed_rows(rows: int, depth: int, block_rows: int, block_depth: int) -> int:
    """Return the rows that `pack` fills for a factor [rows, depth]."""
    return blocks(rows, block_rows) * blocks(depth, block_depth) * block_rows


def pack(factor: Tensor, into: Tensor, block_rows: int, block_depth: int) -> None:
    """Write `factor` [rows, depth] into the zeroed `into` [packed_rows, block_depth] block by block.

    Block (i, k) holds factor[i * block_rows :, k * block_depth :] and begins at row
    (i * blocks(depth) + k) * block_rows, so the blocks of one product follow each other in memory.
    """
    rows, depth = factor.shape
    down, deep = blocks(rows, block_rows), blocks(depth, block_depth)
    view = into.view(down, deep, block_rows, block_depth)
    for k in range(deep):
        columns = factor[:, k * block_depth : (k + 1) * block_depth]
        whole = rows // block_rows
        width = columns.shape[1]
        view[:whole, k, :, :width] = columns[: whole * block_rows].reshape(whole, block_rows, width)
        if whole < down:
            view[whole, k, : rows - whole * block_rows, :width] = columns[whole * block_rows :]


def interleave(packed: Tensor) -> None:
    """Reorder the rows of whole blocks in place, 32 by 32, so that a thread's sums are eight neighbours (fragments.py).

    Row 8 j + 2 t + b of a group then holds what was its row 8 t + 2 j + b. Block heights are multiples of 32.
    """
    groups = packed.view(-1, 4, 4, 2, packed.shape[1])
    groups.copy_(groups.transpose(1, 2).clone())
