"""Masks of localized attention-guided sampling: where a picture's cross-attention looks at an adapter's own words.

Personalized Residuals (Ham et al. 2024): per block, attention over the identifier and class tokens is summed and
binarised at its median, so about half the positions pass; the low-rank branch is then added there only. Open points
settled here: heads are averaged, several tokens are summed, ties with the median pass (a flat map passes everywhere,
which is the plain residual), and a sample that chooses no token gets ones.
"""

import torch
from torch import Tensor

from hueshift.kernels.checks import (
    ALIGNMENT,
    HALF_TYPES,
    REFERENCE_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_inner_contiguous,
    check_shape,
)
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.launch import Launch, jit, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.tiles import blocks

MAX_KEYS = 256
# The median reads a sample's whole map in one program: 128x128 positions is SDXL's largest block.
MAX_POSITIONS = 16384


def lag_mask(q: Tensor, k: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Return the mask [N, T] fp32 of zeros and ones.

    q [N, heads, T, d] and k [N, heads, S, d] are a cross-attention block's queries and keys, one dtype (fp16 or bf16 on
    a GPU), last dimension packed; chosen [N, S] fp32 is 1 for the tokens that count, 0 elsewhere; scale multiplies
    q k^T, usually d ** -0.5. S at most 256, T at most 16384. The probabilities [N, heads, T, S] are never stored.
    CPU tensors take the reference. Raises KernelArgumentError on what does not fit.
    """
    return binarise(attention_share(q, k, chosen, scale))


def attention_share(q: Tensor, k: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Return [N, T] fp32: the probability on the chosen tokens, averaged over heads. Arguments as in `lag_mask`."""
    check_arguments(q, k, chosen)
    if not on_gpu(q):
        return share_reference(q, k, chosen, scale)
    share = torch.empty(q.shape[0], q.shape[2], dtype=torch.float32, device=q.device)
    share_launch(share, q, k, chosen, scale).run()
    return share


def binarise(share: Tensor) -> Tensor:
    """Return [N, T] fp32: 1 where share [N, T] fp32 (not negative) is at least its row's upper median, 0 elsewhere.

    For even T without ties exactly half the positions are 1. Raises KernelArgumentError on what does not fit.
    """
    check_dtype("share", share, (torch.float32, torch.float64))
    check_shape("share", share, (None, None))
    check_contiguous("share", share)
    if share.shape[1] > MAX_POSITIONS:
        raise KernelArgumentError(f"share has {share.shape[1]} positions (allowed: up to {MAX_POSITIONS})")
    if not on_gpu(share):
        return binarise_reference(share)
    mask = torch.empty_like(share)
    median_launch(mask, share).run()
    return mask


def check_arguments(q: Tensor, k: Tensor, chosen: Tensor) -> None:
    """Raise KernelArgumentError unless the arguments fit each other."""
    check_dtype("q", q, HALF_TYPES if q.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("q", q, (None, None, None, None))
    samples, heads, positions, width = q.shape
    check_shape("k", k, (samples, heads, None, width))
    check_dtype("k", k, (q.dtype,))
    keys = k.shape[2]
    if not 1 <= keys <= MAX_KEYS or positions > MAX_POSITIONS or heads < 1:
        raise KernelArgumentError(
            f"{heads} heads, {positions} positions, {keys} keys (allowed: 1 or more, up to {MAX_POSITIONS}, "
            f"1..{MAX_KEYS})"
        )
    check_shape("chosen", chosen, (samples, keys))
    check_dtype("chosen", chosen, (torch.float64,) if q.dtype == torch.float64 else (torch.float32,))
    check_contiguous("chosen", chosen)
    for name, tensor in (("k", k), ("chosen", chosen)):
        check_device(name, tensor, q.device)
    check_inner_contiguous("q", q, 1)
    check_inner_contiguous("k", k, 1)


def reference(q: Tensor, k: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Do the same with torch."""
    return binarise_reference(share_reference(q, k, chosen, scale))


def share_reference(q: Tensor, k: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Do what `attention_share` does with torch, in float32, or in float64 for float64 tensors."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    probability = torch.softmax(q.to(wide) @ k.to(wide).transpose(2, 3) * scale, dim=-1)
    return torch.einsum("nhts,ns->nt", probability, chosen) / q.shape[1]


def binarise_reference(share: Tensor) -> Tensor:
    """Do what `binarise` does with torch."""
    if share.numel() == 0:
        return torch.empty_like(share)
    middle = share.shape[1] // 2
    return (share >= share.sort(dim=1).values[:, middle : middle + 1]).to(share.dtype)


def share_launch(
    share: Tensor, q: Tensor, k: Tensor, chosen: Tensor, scale: float, config: LaunchConfig | None = None
) -> Launch:
    """Return the launch that fills `share` [N, T]; `config` replaces the launch table's choice."""
    config = config or choose(q.device, "lag_mask")
    samples, heads, positions, width = q.shape
    keys = k.shape[2]
    steps = (q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2))
    # Triton learns only of multiples of 16 by itself; SD1.5's heads are 40 wide, and 8 elements are a 16-byte load.
    aligned = q.data_ptr() % ALIGNMENT == 0 and k.data_ptr() % ALIGNMENT == 0
    vector = 8 if aligned and all(step % 8 == 0 for step in (width, *steps)) else 1
    arguments = {
        "share_ptr": share,
        "q_ptr": q,
        "k_ptr": k,
        "chosen_ptr": chosen,
        # exp2 is the hardware's exponential.
        "scale": scale * 1.4426950408889634,
        "positions": positions,
        "keys": keys,
        "width": width // vector,
    }
    names = ("q_sample", "q_head", "q_position", "k_sample", "k_head", "k_key")
    arguments |= {name: step // vector for name, step in zip(names, steps, strict=True)}
    constants = {
        "VECTOR": vector,
        "HEADS": heads,
        "BLOCK_T": config["BLOCK_T"],
        "BLOCK_D": config["BLOCK_D"],
        "KEYS": max(16, 1 << (keys - 1).bit_length()),
    }
    grid = (blocks(positions, config["BLOCK_T"]), samples)
    return Launch(_share_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def median_launch(mask: Tensor, share: Tensor) -> Launch:
    """Return the launch that fills `mask` [N, T] from `share` [N, T]."""
    samples, positions = share.shape
    padded = max(16, 1 << max(0, positions - 1).bit_length())
    arguments = {"mask_ptr": mask, "share_ptr": share, "positions": positions}
    # 16 values a thread at SDXL's 16,384 positions with 32 warps; small maps need few warps.
    warps = min(32, max(1, padded // 512))
    return Launch(_median_kernel, (samples if positions else 0,), arguments, {"BLOCK": padded}, warps, 1)


@jit
def _share_kernel(share_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, chosen_ptr: tl.tensor, scale: tl.tensor,
                  positions: tl.tensor, keys: tl.tensor, width: tl.tensor, q_sample: tl.tensor, q_head: tl.tensor,
                  q_position: tl.tensor, k_sample: tl.tensor, k_head: tl.tensor, k_key: tl.tensor,
                  VECTOR: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_D: tl.constexpr, KEYS: tl.constexpr) -> None:  # fmt: skip
    # One block of positions of one sample: all heads in turn, every key at once, so softmax needs no second pass.
    sample = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.arange(0, KEYS)
    chosen = tl.load(chosen_ptr + sample * keys + s, mask=s < keys, other=0.0)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for head in tl.range(HEADS):
        q_head_ptr = q_ptr + (sample * q_sample + head * q_head) * VECTOR
        k_head_ptr = k_ptr + (sample * k_sample + head * k_head) * VECTOR
        logits = tl.zeros((BLOCK_T, KEYS), tl.float32)
        for start in tl.range(0, width * VECTOR, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            q = tl.load(q_head_ptr + t[:, None] * (q_position * VECTOR) + d[None, :],
                        mask=(t < positions)[:, None] & (d < width * VECTOR)[None, :], other=0.0)  # fmt: skip
            k = tl.load(k_head_ptr + s[:, None] * (k_key * VECTOR) + d[None, :],
                        mask=(s < keys)[:, None] & (d < width * VECTOR)[None, :], other=0.0)  # fmt: skip
            logits = tl.dot(q, k.T, logits)
        logits = tl.where((s < keys)[None, :], logits * scale, float("-inf"))
        weight = tl.exp2(logits - tl.max(logits, 1)[:, None])
        total += tl.sum(weight * chosen[None, :], 1) / tl.sum(weight, 1)
    tl.store(share_ptr + sample * positions + t, total / HEADS, mask=t < positions)


@jit
def _median_kernel(mask_ptr: tl.tensor, share_ptr: tl.tensor, positions: tl.tensor, BLOCK: tl.constexpr) -> None:
    # The upper median is the largest value v with at least T - T // 2 values >= v. Floats that are not negative sort
    # like their bits, so v is found bit by bit from the top: 31 counts, no sort.
    row = tl.program_id(0).to(tl.int64) * positions
    t = tl.arange(0, BLOCK)
    share = tl.load(share_ptr + row + t, mask=t < positions, other=0.0)
    bits = tl.where(t < positions, share.to(tl.int32, bitcast=True), -1)
    needed = positions - positions // 2
    median = 0
    for place in tl.range(31):
        trial = median | (1 << (30 - place))
        enough = tl.sum((bits >= trial).to(tl.int32), 0) >= needed
        median = tl.where(enough, trial, median)
    tl.store(mask_ptr + row + t, (bits >= median).to(tl.float32), mask=t < positions)
