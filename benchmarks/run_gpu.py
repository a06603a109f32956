"""Run the kernels' benchmarks on this machine's GPU: `make bench-gpu`, or

    python -P benchmarks/run_gpu.py [STEM ...] [--models sd15 sdxl] [--sweep] [--out FOLDER]

Every case is checked against float64 before it is timed, and appends one JSON row to FOLDER/STEM.jsonl (default
benchmarks/results; `python -P benchmarks/report.py` then rewrites docs/benchmarks.md). With --sweep every launch
configuration of the table is timed and the rows go to FOLDER/sweep/. Without --models the kernels are timed at both
models' shapes and the engine with sd15 alone: SDXL's has 794 matrices to decompose, and runs where it is asked for
(`unet_step attach --models sdxl`). Each benchmark has a process of its own: after a kernel's illegal access nothing
else runs in the one where it happened. From a checkout that is not installed:
PYTHONPATH=.typing python3 -P benchmarks/run_gpu.py
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hueshift.kernels.bench import Case, Timing, Weight, Work, load_script, time_in_graph
from hueshift.kernels.launch import triton

FOLDER = Path(__file__).resolve().parent
# These measure the whole engine and make their rows themselves, from a kit (engine_kit.py).
ENGINE_STEMS = ("unet_step", "attach", "serve_mixed", "tensorrt_step")
# Of these the others serve SD1.5: diffusers' pipelines and TensorRT's plans of it.
ENGINE_MODELS = {"sd15": ENGINE_STEMS, "sdxl": ("unet_step", "attach")}
STEMS = (
    "spectral_reassemble",
    "lowrank_merge",
    "lowrank_residual",
    "lowrank_linear",
    "factored_linear",
    "factored_conv",
    "slot_linear",
    "group_norm",
    "layer_norm",
    "gated_gelu",
    "residual_add",
    "sampler_step",
    "lag_mask",
    "attention",
    "shared_training",
    "compiled_training",
    *ENGINE_STEMS,
)
# These time whole training steps, many launches each, and make their rows themselves.
STEP_STEMS = ("shared_training", "compiled_training")
MODELS = ("sd15", "sdxl")

ADVICE = """GPU benchmarks skipped: {missing}. Nothing was measured.
They need an NVIDIA GPU of compute capability 8.0 or later with its driver, and a C compiler with Python's headers
(gcc and python3-dev), with which Triton builds what starts its kernels. There `make bench-gpu` installs the rest and
measures; `python -P benchmarks/run_gpu.py --sweep` compares launch configurations. Without a GPU,
`python -P benchmarks/compiled_resources.py` shows what they compile to."""

Timer = Callable[[Sequence[Work]], Timing]


class WrongResultError(RuntimeError):
    """A kernel's result is further from float64 than its case allows."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all benchmarks of one run share; `failed` collects the cases that did not work."""

    device: torch.device
    timer: Timer
    about: Mapping[str, Any]
    sweep: bool
    failed: list[str] = field(default_factory=list)


def read_weights(model: str) -> list[Weight]:
    """Read the weight list of a model, which make_shapes.py wrote."""
    records = json.loads((FOLDER / "shapes" / f"{model}.json").read_text(encoding="utf-8"))
    return [
        Weight(r["name"], tuple(r["shape"]), tuple(r["input"]), r.get("stride", 1), r.get("padding", 0))
        for r in records
    ]


def load_benchmark(stem: str) -> Any:
    """Import benchmarks/STEM.py."""
    return load_script(FOLDER / f"{stem}.py")


def environment(commit: str, device: torch.device) -> dict[str, Any]:
    """Return hardware, versions, date and commit of a row."""
    hardware = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    return {
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
    }


def current_commit() -> str:
    """Return the checkout's short commit, or `unknown` outside one."""
    try:
        command = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(stem: str, case: Case, about: Mapping[str, Any], timer: Timer = time_in_graph) -> dict[str, Any]:
    """Check one case, time it and its baseline, and return its row.

    Raises WrongResultError where the result is wrong: a wrong kernel has no speed.
    """
    error = case.check()
    if not error <= case.tolerance:
        raise WrongResultError(f"{stem} {case.case}: relative error {error:.2e} is over {case.tolerance:.2e}")
    timing, baseline = timer(case.works), timer(case.baselines)
    row: dict[str, Any] = {
        "bench": stem,
        "case": case.case,
        "ms": round(timing.p50, 5),
        "p20": round(timing.p20, 5),
        "p80": round(timing.p80, 5),
        "baseline": case.baseline,
        "baseline_ms": round(baseline.p50, 5),
        "ratio": round(baseline.p50 / timing.p50, 3),
        "floor_ms": round(case.floor_ms, 5),
        "floor_share": round(case.floor_ms / timing.p50, 3),
        "tflops": round(case.flops / timing.p50 / 1e9, 1),
        "gbs": round(case.bytes / timing.p50 / 1e6, 1),
        "error": float(f"{error:.2e}"),
    }
    beyond = timing.p50
    if case.dense is not None:
        row["dense_ms"] = round(timer([case.dense]).p50, 5)
        row["over_dense"] = round(timing.p50 / row["dense_ms"] - 1, 4)
        beyond -= row["dense_ms"]
    details = dict(case.details)
    step = details.pop("step_ms", None)
    if step:
        row["share_of_step"] = round(beyond / step, 4)
    return {**row, **details, **about}


def measure_stem(stem: str, models: Mapping[str, list[Weight]], run: Run) -> Iterator[dict[str, Any]]:
    """Measure one benchmark's cases, one after the other. What fails says why, and the next one is measured."""
    benchmark = load_benchmark(stem)
    if stem in STEP_STEMS:
        for model in [model for model in models if model in benchmark.SHAPES]:
            yield from guarded(benchmark.rows(benchmark.SHAPES[model], run.device, run.about), f"{stem} {model}", run)
        return
    yield from guarded(measure_cases(stem, benchmark.cases(models, run.device, run.sweep), run), stem, run)


def guarded(rows: Iterator[dict[str, Any]], name: str, run: Run) -> Iterator[dict[str, Any]]:
    """Yield rows up to the first failure, such as of memory for the tensors of a case, and note that."""
    try:
        yield from rows
    # The next benchmark makes its own tensors.
    except Exception:
        traceback.print_exc()
        run.failed.append(name)


def measure_cases(stem: str, cases: Iterator[Case], run: Run) -> Iterator[dict[str, Any]]:
    """Measure cases one after the other; one that fails is noted."""
    for case in cases:
        try:
            row = measure(stem, case, run.about, run.timer)
        # Whatever a kernel does wrong: a shape that does not compile must not cost the other shapes their minute.
        except Exception:
            traceback.print_exc()
            run.failed.append(f"{stem} {case.case}")
            continue
        yield row


def run_engine_stems(stems: Sequence[str], run: Run, folder: Path, model: str) -> None:
    """Run the engine's benchmarks on the first CUDA device; one model and its decomposition serve them all."""
    left_out = [stem for stem in stems if stem not in ENGINE_MODELS[model]]
    if left_out:
        print(f"{model}: {', '.join(left_out)} left out; there is {', '.join(ENGINE_MODELS[model])}")
    stems = [stem for stem in stems if stem not in left_out]
    if not stems:
        return
    with tempfile.TemporaryDirectory() as cache:
        kit = load_benchmark("engine_kit").full_kit(run.device, Path(cache), run.about, model)
        for stem in stems:
            try:
                run_engine(stem, kit, folder)
            # The next benchmark has its own engine.
            except Exception:
                traceback.print_exc()
                run.failed.append(f"{stem} {model}")
            # Engines, and the UNets of SDXL, refer to themselves.
            gc.collect()
            torch.cuda.empty_cache()


def run_engine(stem: str, kit: Any, folder: Path) -> list[dict[str, Any]]:
    """Run one benchmark of the engine with a kit, write its rows as they come, each to the file of its bench."""
    rows = []
    for row in load_benchmark(stem).rows(kit):
        with (folder / f"{row['bench']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: value for name, value in row.items() if isinstance(value, float)}
        print(f"{row['bench']:20} {row['case']:44} " + "  ".join(f"{n} {v:.4g}" for n, v in shown.items()), flush=True)
        rows.append(row)
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Benchmark the kernels on this machine's GPU.")
    parser.add_argument("stems", nargs="*", metavar="STEM", help=f"which (default: all of {', '.join(STEMS)})")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help="default: both for the kernels, sd15 for the engine's benchmarks"
    )
    parser.add_argument("--sweep", action="store_true", help="time every launch configuration of the table")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--commit", default=None, help="for a copy of the tree without git")
    options = parser.parse_args(arguments)
    for stem in options.stems:
        if stem not in STEMS:
            parser.error(f"no benchmark {stem!r} (there is: {', '.join(STEMS)})")
    return options


def what_is_missing(device: torch.device | None) -> str | None:
    """Say why nothing can be measured here, None where it can."""
    if triton is None:
        return "Triton is not installed"
    if device is not None or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__}, for CUDA {torch.version.cuda}, finds no device (nvidia-smi shows the driver's)"


def in_turns(stems: Sequence[str]) -> list[list[str]]:
    """Put stems into the groups that share a process, in order: those of the engine, for which a model is made once.

    Kernels come first: they take minutes. Training steps come last and alone, because they choose kernels for the whole
    process that repeat themselves.
    """
    engine = [stem for stem in stems if stem in ENGINE_STEMS]
    kernels = [[stem] for stem in stems if stem not in (*ENGINE_STEMS, *STEP_STEMS)]
    return [*kernels, *([engine] if engine else []), *([stem] for stem in stems if stem in STEP_STEMS)]


def run_apart(groups: Sequence[Sequence[str]], options: argparse.Namespace) -> int:
    """Run each group in a process of its own and return the exit status: 1 where one failed, however it ended."""
    common = ["--out", str(options.out), "--commit", options.commit or current_commit()]
    common += ["--sweep"] if options.sweep else []
    common += ["--models", *options.models] if options.models else []
    failed = []
    for stems in groups:
        command = [sys.executable, "-P", str(FOLDER / "run_gpu.py"), *stems, *common]
        status = subprocess.run(command, check=False).returncode
        if status:
            failed.append(f"{' '.join(stems)} (status {status})")
    if failed:
        print(f"{len(failed)} of {len(groups)} processes failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write_rows(stem: str, models: Mapping[str, list[Weight]], run: Run, folder: Path) -> None:
    """Measure one benchmark and write its rows as they come."""
    with (folder / f"{stem}.jsonl").open("a", encoding="utf-8") as file:
        for row in measure_stem(stem, models, run):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{stem:20} {row['case']:28} {row['ms']:9.4f} ms  floor {row['floor_ms']:9.4f}  "
                f"{row['baseline']} {row['baseline_ms']:9.4f} ms  ratio {row['ratio']:.2f}",
                flush=True,
            )
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def main(
    arguments: Sequence[str],
    *,
    device: torch.device | None = None,
    timer: Timer = time_in_graph,
    weights: Callable[[str], list[Weight]] = read_weights,
) -> int:
    """Run the chosen benchmarks; the exit status is 1 where one failed.

    `device`, `timer` and `weights` replace the GPU, the clock and the models where there is no GPU: in tests.
    """
    options = parse(arguments)
    missing = what_is_missing(device)
    if missing is not None:
        print(ADVICE.format(missing=missing))
        return 0
    wanted = [stem for stem in STEMS if not options.stems or stem in options.stems]
    if options.sweep:
        wanted = [stem for stem in wanted if stem not in (*ENGINE_STEMS, *STEP_STEMS)]
    groups = in_turns(wanted)
    if device is None and len(groups) > 1:
        return run_apart(groups, options)
    torch.manual_seed(0)
    device = device or torch.device("cuda")
    run = Run(device, timer, environment(options.commit or current_commit(), device), options.sweep)
    models = {model: weights(model) for model in options.models or MODELS}
    folder = options.out / "sweep" if options.sweep else options.out
    folder.mkdir(parents=True, exist_ok=True)
    for stems in groups:
        if stems[0] in ENGINE_STEMS:
            for model in options.models or MODELS[:1]:
                run_engine_stems(stems, run, folder, model)
        else:
            write_rows(stems[0], models, run, folder)
    if run.failed:
        print(f"{len(run.failed)} failed: {', '.join(run.failed)}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
