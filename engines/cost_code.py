"""A digest of the code whose calls are measured: costs and forms that were found with other code are found anew."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from hueshift.engines import adapted_unet
from hueshift.kernels import launch_table

_FILES = ("*.py", "launch_*.json")


@cache
def measured_code() -> str:
    """SHA-256 of the kernels' sources and launch tables and of the engines that launch them, as they are installed.

    The version says too little: a launch table is edited, or a branch checked out, without a new one, and the kernels
    of one table may be wrong where those of another are right. All files count, though no call depends on some: to
    measure once too often takes a minute. Read once a process. Raises OSError.
    """
    return digest_code([Path(launch_table.__file__).parent, Path(adapted_unet.__file__).parent])


def digest_code(folders: Iterable[Path]) -> str:
    """SHA-256 over names and contents of the Python files and launch tables in `folders`.

    Raises OSError on a file that cannot be read.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = {file for pattern in _FILES for file in folder.glob(pattern)}
        for file in sorted(files):
            content = file.read_bytes()
            # With its length, or the end of one file could be taken for the name of the next.
            digest.update(f"{folder.name}/{file.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
