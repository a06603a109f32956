"""`hueshift engine`: TensorRT's plan files, built and checked on the GPU's machine before a server needs them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hueshift.adapters.errors import HueshiftError
from hueshift.engines.tensorrt_plans import PlanCache, StoredPlan
from hueshift.server.cli.output import Output, facts_table, rows_table, size_text, time_text
from hueshift.server.cli.serve import stage_bars
from hueshift.server.settings import Settings, load_settings

if TYPE_CHECKING:
    from hueshift.engines.tensorrt_setup import Model, TensorRtParts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Build, list, inspect, verify and prune TensorRT plans, on the GPU's machine.",
)

Config = Annotated[Path | None, typer.Option(help="TOML file of settings.", dir_okay=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]


@dataclass(frozen=True)
class _Command:
    settings: Settings
    output: Output

    @property
    def cache(self) -> PlanCache:
        return PlanCache(self.settings.store.cache_path.expanduser())


@app.command("build")
def build(
    config: Config = None,
    anew: Annotated[bool, typer.Option(help="Build even what is cached.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export the graphs of the base model and build their plans for this GPU, as the settings say. Takes minutes."""
    with _command(config, as_json) as command:
        from hueshift.engines.tensorrt_setup import find_parts, prepare_plans
        from hueshift.server.app import engine_options

        options = engine_options(command.settings)
        with stage_bars(command.output) as bars:
            parts, model = _load(command.settings, find_parts, bars.update)
            plans = prepare_plans(parts, model, options, bars.update, anew=anew)
        _show(command.output, list(plans.values()))


@app.command("list")
def list_plans(config: Config = None, as_json: AsJson = False) -> None:
    """List the plans on disk. Needs no GPU."""
    with _command(config, as_json) as command:
        plans = command.cache.plans()
        _show(command.output, plans)
        if not plans:
            command.output.note("No plans: `hueshift engine build` makes them, and so does a server's first start.")


@app.command("inspect")
def inspect(
    plan: Annotated[str, typer.Argument(help="Name of the plan, or how it begins.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show what a plan was built of and for, whether its bytes are whole, and which weights it refits. Needs no GPU."""
    with _command(config, as_json) as command:
        found = command.cache.named(plan)
        problem = command.cache.problem_of(found)
        facts = {**found.identity, "refits": f"{len(found.weights)} weights", "state": problem or "whole"}
        facts["flags"] = ", ".join(flag for flag in found.identity["flags"] if not flag.endswith(_WEIGHT_ENDINGS))
        value = {**_plain(found), "identity": found.identity, "weights": found.weights, "problem": problem}
        command.output.result(value, facts_table({name: str(fact) for name, fact in facts.items()}))
        if problem:
            raise typer.Exit(1)


@app.command("verify")
def verify_plans(config: Config = None, as_json: AsJson = False) -> None:
    """Load the plans for this GPU, building what is missing, and compare them with torch; exit 1 on mismatch."""
    with _command(config, as_json) as command:
        from hueshift.engines.tensorrt_setup import find_parts, load_engine, prepare_plans
        from hueshift.engines.tensorrt_verify import verify
        from hueshift.server.app import engine_options

        options = engine_options(command.settings)
        with stage_bars(command.output) as bars:
            parts, model = _load(command.settings, find_parts, bars.update)
            plans = prepare_plans(parts, model, options, bars.update)
            errors = verify(load_engine(parts, model, options, plans), model.base, options.fp16_parity_bound)
        rows = [(role, f"{error:.2e}", f"{options.fp16_parity_bound:.0e}") for role, error in errors.items()]
        command.output.result(errors, rows_table(("plan", "error", "allowed"), rows))


@app.command("prune")
def prune(
    keep: Annotated[
        list[str] | None, typer.Option(help="Begin of the name of a plan to keep; may be repeated.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every plan, and the timing caches.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Remove damaged plans; with --keep all but those named; with --all every one. Not while a server starts."""
    with _command(config, as_json) as command:
        cache = command.cache
        kept = {cache.named(name).key for name in keep or ()}
        plans = cache.plans()
        doomed = [p for p in plans if p.key not in kept and (everything or kept or cache.problem_of(p))]
        for plan in doomed:
            cache.remove(plan.key)
        if everything and not kept:
            shutil.rmtree(cache.folder, ignore_errors=True)
        freed = sum(plan.size for plan in doomed)
        value = {"removed": [plan.key for plan in doomed], "bytes": freed}
        command.output.result(value, f"removed {len(doomed)} of {len(plans)} plans, {size_text(freed)}")


_COLUMNS = ("plan", "role", "library", "GPU", "batch", "sides", "size", "built")
_WEIGHT_ENDINGS = (".weight", ".transposed")


@contextmanager
def _command(config: Path | None, as_json: bool) -> Iterator[_Command]:
    output = Output(as_json)
    try:
        yield _Command(load_settings(config), output)
    except HueshiftError as error:
        output.error(error.message, code=error.reason.value)
        raise typer.Exit(1) from error


def _load(settings: Settings, find_parts: Any, report: Any) -> "tuple[TensorRtParts, Model]":
    """Find TensorRT first, since loading the model takes a while, then the model and its decomposition."""
    from hueshift.engines.base_model import load_base_model
    from hueshift.engines.build import choose_device
    from hueshift.engines.rows import RowLayout, read_norms
    from hueshift.engines.svd_cache import load_factors
    from hueshift.engines.tensorrt_setup import Model
    from hueshift.server.app import base_device, engine_options

    options = engine_options(settings)
    import torch

    place = base_device(settings.engine)
    parts = find_parts(torch.device(place))
    base = load_base_model(settings.model.path, device=place)
    choose_device(options.device, base)
    factors = load_factors(base, options.cache_dir, lambda done, total: report("decompose", done, total))
    rows = RowLayout(base.layout, options.lowrank_targets, options.lowrank_rank, text_side=False)
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    return parts, Model(base, factors, rows, norms)


def _show(output: Output, plans: list[StoredPlan]) -> None:
    output.result([_plain(plan) for plan in plans], rows_table(_COLUMNS, [_row(plan) for plan in plans]))


def _plain(plan: StoredPlan) -> dict[str, Any]:
    shown = ("role", "library", "version", "gpu", "capability", "ranges")
    return {"plan": plan.key, "bytes": plan.size, "built": plan.built, **{name: plan.identity[name] for name in shown}}


def _row(plan: StoredPlan) -> tuple[str, ...]:
    identity = plan.identity
    low, _, high = identity["ranges"]["sides"]
    return (
        plan.key,
        identity["role"],
        f"{identity['library']} {identity['version']}",
        f"{identity['gpu']} ({identity['capability']})",
        f"1 to {identity['ranges']['max_batch']}",
        f"{low} to {high}",
        size_text(plan.size),
        time_text(plan.built),
    )
