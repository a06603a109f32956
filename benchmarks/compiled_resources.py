"""What every launch configuration compiles to, without a GPU: registers, spills, shared memory, widths of accesses.

    python -P benchmarks/compiled_resources.py [KERNEL ...] [--arch sm_90 ...] [--json FILE]

One line a kernel, configuration and variant of its arguments, at the shapes of SD1.5 and SDXL. `programs` are asked for
and resident on one multiprocessor: where fewer are resident than asked for, a persistent launch has a second, emptier
wave. `waves` are of a launch that is not persistent, on an H200. `races` (kernels/matrix_hazards.py) must be 0. `ld`,
`st` and `cp` count instructions by bytes a thread: cp are asynchronous copies into shared memory, TMA reads whole
tiles. These are facts about compiled code, and no measurements.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hueshift.kernels import (
    factored_conv,
    gated_gelu,
    group_norm,
    lag_mask,
    layer_norm,
    lowrank_linear,
    lowrank_merge,
    lowrank_residual,
    residual_add,
    sampler_step,
    slot_linear,
    spectral_reassemble,
)
from hueshift.kernels.cross_compile import Compiled, compile_launch
from hueshift.kernels.launch import Launch, triton
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, LaunchConfig, candidates, load
from hueshift.kernels.lowrank_merge import MergeLayer
from hueshift.kernels.matrix_hazards import overwritten_operands, unguarded_copies
from hueshift.kernels.product import product_launch, shape_class
from hueshift.kernels.spectral_plan import SpectralLayer
from hueshift.kernels.spectral_plan import build_tables as spectral_tables

H200_MULTIPROCESSORS = 132
HALF = torch.float16
# Launches whose programs walk a list of tiles: as many programs as are asked for, whatever the work.
PERSISTENT = ("_reassemble_kernel", "_merge_kernel", "_product_kernel", "_linear_kernel", "_slot_kernel")

Variant = tuple[str, Launch]
Variants = Callable[[LaunchConfig, str], Iterator[Variant]]


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """Return memory that nothing reads: only shape, strides and alignment count."""
    return torch.empty(shape, dtype=dtype)


def spectral_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """One adapter; the products do not depend on how many where the smaller factor is scaled before."""
    base = empty(8, 16)
    layer = SpectralLayer(empty(8, 8), torch.ones(8), empty(8, 16), base, torch.empty_like(base), 0)
    tables = spectral_tables([layer], 8, config)
    for launch in spectral_reassemble.launches(tables, torch.zeros(1, 8), torch.ones(1), effective=False):
        yield launch.kernel.__name__.strip("_").removesuffix("_kernel"), launch


def merge_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """One adapter and eight; ranks that are multiples of eight."""
    base = empty(8, 16)
    tables = lowrank_merge.build_tables([MergeLayer(base, torch.empty_like(base))], config)
    for count in (1, 8):
        table = torch.zeros(1, count, 4, dtype=torch.int64)
        (launch,) = lowrank_merge.launches(tables, table, torch.zeros(count), 8)
        yield f"{count} adapters", launch


def residual_variants(config: LaunchConfig, chosen: str) -> Iterator[Variant]:
    """Ranks 4, 16 and 128 at SD1.5's widest and deepest attention, batch 16."""
    tokens, width = (4096, 320) if chosen == "many_tokens" else (256, 1280)
    for rank in (4, 16, 128):
        for launch in lowrank_residual.launches(
            empty(16, tokens, width),
            empty(16, tokens, width),
            empty(16, rank, width),
            empty(16, width, rank),
            torch.zeros(16, dtype=torch.int32),
            torch.zeros(16),
            None,
            config,
        ):
            yield f"rank {rank}{launch.kernel.__name__.removesuffix('_kernel').replace('_', ' ')}", launch


def linear_variants(config: LaunchConfig, chosen: str) -> Iterator[Variant]:
    """Ranks 16 and 64 at the attention of SD1.5."""
    tokens, width = (4096, 320) if chosen == "narrow_tiles" else (1024, 640)
    for rank in (16, 64):
        yield (
            f"rank {rank}",
            lowrank_linear.linear_launch(
                empty(2, tokens, width),
                empty(2, tokens, width),
                empty(width, width),
                empty(width),
                empty(2, rank, width),
                empty(2, width, rank),
                torch.zeros(2, dtype=torch.int32),
                torch.zeros(2),
                None,
                config,
            ),
        )


def factored_linear_variants(config: LaunchConfig, chosen: str) -> Iterator[Variant]:
    """The first product for a picture's tokens, and a text's 77."""
    for tokens, width in ((4096, 320), (1024, 640), (64, 1280), (77, 1280)):
        if shape_class(tokens, width) == chosen:
            x, weight = empty(2 * tokens, width), empty(width, width)
            scale: dict[str, Any] = {"sigma": torch.zeros(3, width), "index": torch.zeros(2, dtype=torch.int32)}
            yield f"{tokens} tokens", product_launch(x, x, weight, tokens=tokens, config=config, **scale)


def factored_conv_variants(config: LaunchConfig, chosen: str) -> Iterator[Variant]:
    """The scale and the second product at SD1.5's sizes of pictures."""
    for tokens, width in ((4096, 320), (1024, 640), (256, 1280)):
        if factored_conv.expand_class(tokens, width) != chosen:
            continue
        pixels, u, own = empty(2, tokens, width), empty(1, width, width), empty(2, width, width)
        source, target = (u, own) if config["SCALED_WEIGHTS"] else (pixels, pixels)
        index = torch.zeros(2, dtype=torch.int32)
        yield f"{tokens} tokens, scale", factored_conv.scale_launch(target, source, torch.zeros(3, width), index)
        if not config["SECOND_CUBLAS"]:
            weight, y = own if config["SCALED_WEIGHTS"] else u[0], empty(2 * tokens, width)
            launch = product_launch(y, pixels.flatten(0, 1), weight, tokens=tokens, config=config, bias=empty(width))
            yield f"{tokens} tokens", launch


def slot_linear_variants(config: LaunchConfig, chosen: str) -> Iterator[Variant]:
    """SD1.5's attention on its two larger pictures."""
    tokens, width = (4096, 320) if chosen == "narrow_tiles" else (1024, 640)
    x, weights, index = empty(2, tokens, width), empty(3, width, width), torch.zeros(2, dtype=torch.int64)
    yield f"{tokens} tokens", slot_linear.linear_launch(torch.empty_like(x), x, weights, index, empty(width), config)


def group_norm_variants(config: LaunchConfig, chosen: str) -> Iterator[Variant]:
    """SD1.5's largest and smallest pictures with everything on: slots' weights, both shifts, SiLU."""
    side, channels = (64, 320) if chosen == "many_pixels" else (16, 1280)
    x = empty(2, channels, side, side).contiguous(memory_format=torch.channels_last)
    bias, shift, index = empty(channels), empty(2, channels), torch.zeros(2, dtype=torch.int64)
    given = (torch.empty_like(x), x, torch.zeros(3, channels), bias, 32, 1e-5, index, shift, bias)
    for launch in group_norm.launches(*given, silu=True, config=config):
        yield launch.kernel.__name__.strip("_").removesuffix("_kernel"), launch


def layer_norm_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """The widths of SD1.5's transformers, with weights for everybody and with slots' weights."""
    index = torch.zeros(2, dtype=torch.int32)
    for tokens, width in ((4096, 320), (1024, 640), (256, 1280)):
        x, bias = empty(2, tokens, width), empty(width)
        yield f"{width} shared", layer_norm.norm_launch(x, x, bias, bias, 1e-5, None, config)
        yield f"{width} slots", layer_norm.norm_launch(x, x, torch.zeros(3, width), bias, 1e-5, index, config)


def gelu_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """SD1.5's largest transformers."""
    yield "1280", gated_gelu.gelu_launch(empty(2, 4096, 1280), empty(2, 4096, 2560), config)


def add_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """SD1.5's largest resnets and transformers: with a convolution's bias, and without."""
    x = empty(2, 4096, 320)
    for name, bias in (("bias", empty(320)), ("no bias", None)):
        yield name, residual_add.add_launch(x, x, x, bias, config)


def sampler_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """SD1.5's latents, without and with noise."""
    x, rows = torch.zeros(8, 4, 64, 64), torch.zeros(8, dtype=torch.int64)
    for noise in (None, x):
        arguments = (x, x, empty(16, 4, 64, 64), rows, rows, torch.zeros(8), torch.zeros(8, 6), noise)
        yield "noise" if noise is not None else "no noise", sampler_step.step_launch(*arguments, config=config)


def mask_variants(config: LaunchConfig, _: str) -> Iterator[Variant]:
    """The head widths of SD1.5 (40, 160) and SDXL (64), and the median of the largest maps."""
    for width, positions in ((40, 4096), (160, 64), (64, 4096)):
        q, k = empty(2, positions, 8, width).transpose(1, 2), empty(2, 77, 8, width).transpose(1, 2)
        share = torch.zeros(2, positions)
        yield f"heads of {width}", lag_mask.share_launch(share, q, k, torch.zeros(2, 77), 1.0, config)
    yield "median", lag_mask.median_launch(torch.zeros(8, 4096), torch.zeros(8, 4096))


VARIANTS: dict[str, Variants] = {
    "spectral_reassemble": spectral_variants,
    "lowrank_merge": merge_variants,
    "lowrank_residual": residual_variants,
    "lowrank_linear": linear_variants,
    "factored_linear": factored_linear_variants,
    "factored_conv": factored_conv_variants,
    "slot_linear": slot_linear_variants,
    "group_norm": group_norm_variants,
    "layer_norm": layer_norm_variants,
    "gated_gelu": gelu_variants,
    "residual_add": add_variants,
    "sampler_step": sampler_variants,
    "lag_mask": mask_variants,
}


def rows(arch: str, kernels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compile every configuration of these kernels for `arch` and yield what came out."""
    for kernel in kernels:
        for chosen in load(arch)["kernels"][kernel]:
            for number, config in enumerate(candidates(arch, kernel, chosen)):
                for variant, launch in VARIANTS[kernel](config, chosen):
                    yield row(arch, f"{kernel}/{chosen}/{number}", variant, launch, config)


def row(arch: str, name: str, variant: str, launch: Launch, config: LaunchConfig) -> dict[str, Any]:
    """Compile one launch and return its line."""
    found = compile_launch(launch, arch)
    resident = found.programs(arch)
    persistent = launch.kernel.__name__ in PERSISTENT
    programs = 1
    for size in launch.grid:
        programs *= size
    return {
        "arch": arch,
        "configuration": name,
        "variant": variant,
        "constants": launch.constants,
        "warps": found.warps,
        "stages": launch.num_stages,
        "registers": found.registers,
        "spilled_bytes": found.stack_bytes,
        "shared_bytes": found.shared_bytes,
        "programs": f"{config.programs_per_sm}/{resident}" if persistent else f"-/{resident}",
        # With few tokens the grid follows the multiprocessors, which this machine has not got.
        "waves": None if persistent or "few_tokens" in name else round(programs / (H200_MULTIPROCESSORS * resident), 2),
        "tensor_core": found.tensor_core,
        "tma": found.tma_copies,
        "races": len(overwritten_operands(found.ptx)) + len(unguarded_copies(found.ptx)),
        **{kind: widths(found, kind) for kind in ("ld", "st", "cp")},
    }


def widths(found: Compiled, kind: str) -> str:
    """Format the accesses of one kind, widest first, as `16Bx4 4Bx2`."""
    counted: Counter[int] = found.accesses(kind)
    return " ".join(f"{size}Bx{count}" for size, count in sorted(counted.items(), reverse=True)) or "-"


COLUMNS = {
    "arch": 6,
    "configuration": 34,
    "variant": 16,
    "warps": 5,
    "registers": 9,
    "spilled_bytes": 13,
    "shared_bytes": 12,
    "programs": 8,
    "waves": 6,
    "tensor_core": 11,
    "tma": 3,
    "races": 5,
    "ld": 22,
    "st": 12,
    "cp": 18,
}


def main(arguments: Sequence[str]) -> int:
    """Print the table; the exit status says whether nothing spills or races."""
    parser = argparse.ArgumentParser(description="Show what the launch configurations compile to.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"which (default: all of {', '.join(VARIANTS)})")
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_MEMORY_LIMITS), default=list(SHARED_MEMORY_LIMITS))
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here, one JSON object a line")
    options = parser.parse_args(arguments)
    for kernel in options.kernels:
        if kernel not in VARIANTS:
            parser.error(f"no kernel {kernel!r} (there is: {', '.join(VARIANTS)})")
    if triton is None:
        print("Nothing was compiled: Triton is missing (pip install 'hueshift[gpu]').")
        return 0
    print("  ".join(name.ljust(width) for name, width in COLUMNS.items()).rstrip())
    lines, faults = [], 0
    for arch in options.arch:
        for found in rows(arch, options.kernels or list(VARIANTS)):
            cells = ("-" if found[name] is None else str(found[name]) for name in COLUMNS)
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)).rstrip())
            faults += found["spilled_bytes"] > 0 or found["races"] > 0
            lines.append(json.dumps(found))
    if options.json is not None:
        options.json.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} launches, {faults} of them spill registers or race.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
