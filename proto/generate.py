"""Write the Python stubs of the contract beside the .proto files (`make proto`), or into another folder.

The .proto files lie at hueshift/v1/ below this folder, so the generated imports read `from hueshift.v1 import ...` as
they are, and no stub is edited after it is generated.
"""

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate_stubs(out: Path) -> None:
    """Generate messages, services and their types into `out`.

    Raises RuntimeError if the compiler refuses a file; it has printed why.
    """
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("hueshift/v1/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status} on {', '.join(sources)}")


if __name__ == "__main__":
    generate_stubs(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
