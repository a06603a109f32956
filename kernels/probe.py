"""Whether Triton can compile and launch anything here, told in words before the first real kernel fails."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from hueshift.kernels.errors import KernelUnavailableError
from hueshift.kernels.launch import Launch, jit, tl, triton

# On Debian and Ubuntu; other systems have them under similar names.
_PACKAGES = "gcc libc6-dev python3-dev"


def check_launches(device: torch.device) -> None:
    """Compile and launch a kernel that does next to nothing.

    Raises KernelUnavailableError where that fails, with the cause and with what Triton's build lacks as far as it can
    be seen: it writes a launcher in C when a process launches its first kernels, unless its cache has one.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        Launch(_probe_kernel, (1,), {"out_ptr": out}, {}, 1, 1).run()
    except Exception as error:
        # Triton has errors of its own, and runs a compiler that may fail in any way.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        told = "; ".join(missing_tools()) or f"the compiler is there ({compiler()}), look at what it wrote"
        raise KernelUnavailableError(f"no Triton kernel can be launched on {device} ({cause}): {told}") from error


def missing_tools() -> list[str]:
    """What Triton's build lacks, each with what to do; empty if nothing is seen to be missing."""
    if triton is None:
        return ["Triton is not installed; install the `gpu` extra (pip install 'hueshift[gpu]')"]
    found = []
    name = compiler()
    if name is None or shutil.which(name) is None:
        looked = "gcc or clang on the PATH, or the one named by CC" if name is None else f"{name!r}, which CC names"
        found.append(f"there is no C compiler (looked for: {looked}); install one (Debian: {_PACKAGES})")
    # As Triton looks for them: Debian's own default names a place below /usr/local.
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    header = Path(folder) / "Python.h"
    if not header.is_file():
        found.append(f"Python's headers are missing ({header}); install them (Debian: python3-dev)")
    return found


def compiler() -> str | None:
    """The C compiler that Triton takes: CC, else gcc, else clang; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@jit
def _probe_kernel(out_ptr: tl.tensor) -> None:
    tl.store(out_ptr, 1)
