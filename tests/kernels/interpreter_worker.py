"""Runs kernels under Triton's interpreter, which must be chosen before Triton is imported: hence a process of its own.

Each line of standard input is a JSON object {path, function, parameters}: the function of that test file is called and
what it returns, a flat dict of floats, is written back as one line.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def load(path: str) -> Any:
    """Import a test file by its path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Answer requests until standard input ends."""
    answers = sys.stdout
    # Whatever a kernel prints must not be taken for an answer.
    sys.stdout = sys.stderr
    modules: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        path = request["path"]
        try:
            if path not in modules:
                modules[path] = load(path)
            answer = {"result": getattr(modules[path], request["function"])(**request["parameters"])}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
