"""Pieces that several Triton kernels share: reading and writing tiles of a row-major matrix."""

from hueshift.kernels.launch import jit, tl


@jit
def read_tile(matrix: tl.tensor, m: tl.tensor, n: tl.tensor, rows: tl.tensor, cols: tl.tensor) -> tl.tensor:
    """Load matrix[m, n] of a contiguous [rows, cols] matrix; 0 outside."""
    mask = (m < rows)[:, None] & (n < cols)[None, :]
    return tl.load(matrix + m[:, None] * cols + n[None, :], mask=mask, other=0.0)


@jit
def read_once(matrix: tl.tensor, m: tl.tensor, n: tl.tensor, rows: tl.tensor, cols: tl.tensor) -> tl.tensor:
    """Load as read_tile does, a tile that no other program reads: L2 may drop it before what is shared."""
    mask = (m < rows)[:, None] & (n < cols)[None, :]
    return tl.load(matrix + m[:, None] * cols + n[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@jit
def write_sum(out: tl.tensor, weight: tl.tensor, change: tl.tensor, m: tl.tensor, n: tl.tensor, rows: tl.tensor,
              cols: tl.tensor) -> None:  # fmt: skip
    """Store weight + change at [m, n], added in fp32.

    Where nothing changes the weight's own bits are kept: -0.0 + 0.0 would turn into +0.0.
    """
    value = tl.where(change == 0.0, weight, (weight.to(tl.float32) + change).to(weight.dtype))
    mask = (m < rows)[:, None] & (n < cols)[None, :]
    tl.store(out + m[:, None] * cols + n[None, :], value, mask=mask, eviction_policy="evict_first")


@jit
def halves(tile: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """Split a tile [ROWS, COLS] into its left and right half."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))
