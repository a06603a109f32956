"""What many tests share: the embedded base model, and a cache that keeps exported graphs between runs."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Set before torch is loaded: threads that spin while they wait would starve the servers and workers that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Progress bars of model loading would drown the test report.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
from postgres import run_postgres

from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.models.embedded import EMBEDDED_MODEL

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def base_model() -> BaseModel:
    """The embedded base model in fp32 on the CPU. Nobody may change it."""
    return load_base_model(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def cache_dir(pytestconfig: pytest.Config) -> Path:
    """Folder of decompositions and exported graphs, keyed by content, kept in pytest's own cache between runs."""
    return Path(pytestconfig.cache.mkdir("hueshift"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of optional real-world fixtures beside the project; tests that need it skip where it is absent."""
    folder = PROJECT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"the optional fixture folder {folder.name}/ is not beside the project")
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a Postgres of our own, without the name of a database; `fresh_database` makes those."""
    with run_postgres() as url:
        yield url
