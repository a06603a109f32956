"""Launch configurations per architecture, read from `launch_<architecture>.json` beside this file.

Nothing is tuned at run time. Each list's first entry is the current choice and the others are what
`benchmarks/run_gpu.py --sweep` compares it with; `measured` says what a choice rests on.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hueshift.kernels.errors import KernelArgumentError, KernelUnavailableError

# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications per capability).
SHARED_MEMORY_LIMITS = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448}


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched: compile-time constants, warps, pipeline stages, programs per multiprocessor."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    programs_per_sm: int
    measured: str

    def __getitem__(self, name: str) -> Any:
        """Return one constant, such as a block size."""
        return self.constants[name]


def architecture(device: torch.device) -> str:
    """Return the launch table to use on `device`.

    8.0 and 8.7 have 163 KiB of shared memory per block; 8.6, 8.9 and 12.x have 99 KiB; 9.0 and 10.x have 227 KiB and
    TMA. A CPU counts as sm_90: there the kernels only run interpreted. Raises KernelUnavailableError below 8.0.
    """
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelUnavailableError(f"compute capability {major}.{minor} (needed: 8.0 or later, for 16-bit mma)")
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_89" if major in (8, 12) else "sm_90"


@cache
def candidates(arch: str, kernel: str, shape_class: str = "any") -> tuple[LaunchConfig, ...]:
    """Return the configurations of one kernel and shape class, the current choice first.

    Raises KernelArgumentError where the table has none.
    """
    entries = load(arch)["kernels"].get(kernel, {}).get(shape_class)
    if not entries:
        raise KernelArgumentError(f"no launch configuration for {kernel}/{shape_class} on {arch}")
    return tuple(
        LaunchConfig(
            constants=dict(entry["constants"]),
            num_warps=entry["num_warps"],
            num_stages=entry["num_stages"],
            programs_per_sm=entry.get("programs_per_sm", 1),
            measured=entry["measured"],
        )
        for entry in entries
    )


def candidates_by_class(
    device: torch.device, kernel: str, shape_classes: Sequence[str]
) -> Iterator[tuple[str, str, LaunchConfig]]:
    """Yield all candidates of a device as (name, shape class, configuration), named such as `cut_tiles-0`.

    Raises KernelArgumentError as `candidates`.
    """
    for shape_class in shape_classes:
        for number, config in enumerate(candidates(architecture(device), kernel, shape_class)):
            yield f"{shape_class}-{number}", shape_class, config


def choose(device: torch.device, kernel: str, shape_class: str = "any") -> LaunchConfig:
    """Return the current choice for `device`."""
    return candidates(architecture(device), kernel, shape_class)[0]


@cache
def load(arch: str) -> dict[str, Any]:
    """Return one architecture's whole table. Raises KernelArgumentError on an unknown architecture."""
    if arch not in SHARED_MEMORY_LIMITS:
        raise KernelArgumentError(f"no launch table for {arch} (there is: {', '.join(SHARED_MEMORY_LIMITS)})")
    table: dict[str, Any] = json.loads(Path(__file__).with_name(f"launch_{arch}.json").read_text())
    return table
