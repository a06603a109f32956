"""A digest of the code whose calls are measured: costs and forms that were found with other code are found anew."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from hueshift.engines import adapted_unet
from hueshift.kernels import launch_table

_KERNEL_FILES = ("*.py", "launch_*.json")
# What makes the launches of a captured call, and with which layers.
_ENGINE_FILES = ("adapted_*.py", "cuda_*.py", "guided_attention.py", "merged_*.py")


@cache
def measured_code() -> str:
    """SHA-256 of the kernels' sources and launch tables and of the engine's layers, as they are installed.

    The version says too little: a launch table is edited, or a branch checked out, without a new one, and the kernels
    of one table may be wrong where those of another are right. Read once a process. Raises OSError.
    """
    kernels, engines = Path(launch_table.__file__).parent, Path(adapted_unet.__file__).parent
    return digest_code([(kernels, _KERNEL_FILES), (engines, _ENGINE_FILES)])


def digest_code(folders: Iterable[tuple[Path, tuple[str, ...]]]) -> str:
    """SHA-256 over names and contents of the files in `folders` that match one of the patterns beside each folder.

    Raises OSError on a file that cannot be read.
    """
    digest = hashlib.sha256()
    for folder, patterns in folders:
        files = {file for pattern in patterns for file in folder.glob(pattern)}
        for file in sorted(files):
            content = file.read_bytes()
            # With its length, or the end of one file could be taken for the name of the next.
            digest.update(f"{folder.name}/{file.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
