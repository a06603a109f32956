"""What was measured is known by the code that was measured."""

import shutil
from pathlib import Path

from host_cuda import cuda_engine
from tiny_unet import TinyParts

from hueshift.engines.cost_code import digest_code, measured_code
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_setup import describe
from hueshift.kernels import factored_linear, launch_table


def copied(folder: Path) -> Path:
    """The kernels' folder, to be changed."""
    target = folder / "kernels"
    shutil.copytree(Path(launch_table.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_a_changed_kernel_or_table_gives_another_digest(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    found = [digest_code([folder])]
    for name in ("launch_sm_90.json", Path(str(factored_linear.__file__)).name):
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\n")
        found.append(digest_code([folder]))
    (folder / "another.py").write_text("", encoding="utf-8")
    found.append(digest_code([folder]))
    assert len(set(found)) == 4
    # What no call depends on does not count, nor where the folder lies.
    (folder / "notes.txt").write_text("read me", encoding="utf-8")
    moved = folder.rename(tmp_path / "moved").rename(tmp_path / "kernels")
    assert digest_code([moved]) == found[-1]


def test_names_and_contents_are_told_apart(tmp_path: Path) -> None:
    for name, parts in (("one", {"a.py": "x", "b.py": ""}), ("two", {"a.py": "", "b.py": "x"})):
        for file, text in parts.items():
            (tmp_path / name / "kernels").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "kernels" / file).write_text(text, encoding="utf-8")
    one, two = (digest_code([tmp_path / name / "kernels"]) for name in ("one", "two"))
    assert one != two


def test_the_costs_of_an_engine_are_kept_for_its_code(tiny: TinyParts) -> None:
    engine = cuda_engine(tiny, HostLane(), weight_slots=0)
    installed = Path(launch_table.__file__).parent
    assert {"launch_sm_90.json", "factored_linear.py", "product.py"} <= {file.name for file in installed.iterdir()}
    assert describe(engine)["code"] == measured_code()
    assert len(measured_code()) == 64
