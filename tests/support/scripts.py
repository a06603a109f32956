"""Load a script of the project that belongs to no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).resolve().parent.parent.parent


def load_script(path: str) -> ModuleType:
    """Import the file at `path` below the project folder. Raises FileNotFoundError if it is missing."""
    file = PROJECT / path
    spec = importlib.util.spec_from_file_location(f"hueshift_script_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
