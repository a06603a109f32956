"""Measures a CUDA engine at start: which form of the layers is faster, what each call costs, what a merge costs.

The figures go to disk (engines/cost_store.py), so only the first start on a GPU pays for measuring.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.cost_model import CostTable
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_graphs import GraphKey
from hueshift.engines.cuda_lane import GraphLane, Work
from hueshift.engines.cuda_options import CompileKind, KernelUse
from hueshift.engines.device_errors import Fault, classify
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, EngineRow, Plan, no_guides
from hueshift.engines.merged_slots import BASE_ROLE
from hueshift.engines.torch_engine import example_added, example_inputs
from hueshift.engines.trial_size import as_fits, form_shapes

Progress = Callable[[str, int, int], None]

_REPEATS = 7
# Largest difference of the two forms, over the largest output: fp16 alone makes 3e-3.
_FORM_BOUND = 2e-2
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Trial:
    """Both forms of a plan on the same `rows` rows: the largest difference of the kernels from torch, over the largest
    output, and milliseconds of a captured call of each, where they were timed.
    """

    plan: Plan
    rows: int
    error: float
    torch_ms: float | None = None
    kernels_ms: float | None = None

    @property
    def right(self) -> bool:
        """True if rounding explains the difference. Written so that NaN does not pass."""
        return self.error <= _FORM_BOUND

    def told(self) -> dict[str, str | int | float | None]:
        """The same for the log."""
        return {
            "plan": self.plan.value,
            "rows": self.rows,
            "error": self.error,
            "torch_ms": self.torch_ms,
            "kernels_ms": self.kernels_ms,
        }


def choose_forms(engine: CudaEngine, known: Mapping[Plan, bool] | None) -> dict[Plan, bool]:
    """Let each plan run in its faster form, by `known` or by measuring both; return which use the kernels. A plan whose
    kernels failed runs without them and is left out: the next start may find what they lacked, such as a compiler.

    With `engine.kernels` on or off there is nothing to choose. Where it is on, the kernels are still compared with
    torch's form of each plan that is not `known`: raises FailedPrecondition (ENGINE_PARITY) if they are wrong.
    """
    found: dict[Plan, bool] = {}
    for plan in SLAB_PLANS:
        if engine.options.kernels is KernelUse.OFF:
            found[plan] = False
        elif engine.options.kernels is KernelUse.ON:
            if known is None or plan not in known:
                _refuse_wrong(_try_forms(engine, plan, timed=False))
            found[plan] = True
        else:
            won = known[plan] if known is not None and plan in known else _kernels_win(engine, plan)
            if won is not None:
                found[plan] = won
        engine.networks.choose(plan, kernels=found.get(plan, False))
    # The row of the last trial may still be on its way into weights of slots that are now let go.
    engine.finish_rows()
    engine.lane.mark().wait()
    engine.networks.settle()
    return found


def check_merged(engine: CudaEngine) -> None:
    """Merge nothing where weights that were written draw something else than the factored plan, or writing fails."""
    if not engine.weight_slots:
        return
    told: dict[str, float] = {}
    try:
        told["error"] = _merged_error(engine)
        # Written so that NaN does not pass.
        if told["error"] <= _FORM_BOUND:
            _log.info("merged_form", **told)
            return
        _log.error("merged_form_wrong", bound=_FORM_BOUND, serves="the factored plan", **told)
    except Exception as error:
        _raise_unless_other(error)
        _log.error("merged_form_failed", serves="the factored plan", exc_info=error)
    engine.stop_merging()


def check_compiled(engine: CudaEngine) -> None:
    """Leave the networks of a plan uncompiled where torch.compile's kernels draw something else than torch's, or where
    it fails.
    """
    if engine.options.compile is CompileKind.INDUCTOR:
        for plan in (Plan.DENSE, Plan.FACTORED):
            if not _compiles_right(engine, plan):
                engine.graphs.forget(plan.value)
                engine.networks.leave_uncompiled(plan)


def warm_all(engine: CudaEngine, progress: Progress) -> dict[GraphKey, Work]:
    """Compile and capture everything that `engine.warm` would; what does not fit in memory is left out, with a word.

    Returns what queues each call.
    """
    wanted = engine.captures_to_warm()
    calls: dict[GraphKey, Work] = {}
    for done, (role, shape, _) in enumerate(wanted):
        progress("capture", done, len(wanted))
        call = engine.warm_if_fits(role, shape)
        if call is not None:
            calls[GraphKey(role, shape)] = call
    progress("capture", len(wanted), len(wanted))
    return calls


def measure_costs(engine: CudaEngine, calls: Mapping[GraphKey, Work], progress: Progress) -> CostTable:
    """Time every warmed call, one merge, and the host's share of a call."""
    lane = engine.lane
    times: dict[tuple[Plan, int, tuple[int, int]], float] = {}
    _fill_as_served(engine)
    for done, (key, call) in enumerate(calls.items()):
        progress("calibrate", done, len(calls))
        # All copies of merged weights cost the same; the base's stands for them.
        if key.role == BASE_ROLE or key.role in SLAB_PLANS:
            plan = Plan.MERGED if key.role == BASE_ROLE else Plan(key.role)
            shape = key.shape
            with torch.no_grad():
                times[plan, shape.rows, (shape.height, shape.width)] = _median_ms(lane, call)
    progress("calibrate", len(calls), len(calls))
    return CostTable(times, _merge_ms(engine), _overhead_ms(engine, times))


def measure_capacity(engine: CudaEngine, calls: Mapping[GraphKey, Work]) -> dict[tuple[int, int], int]:
    """UNet rows of one call that fit, by warmed size: the largest bucket that every slab plan could be captured at."""

    def fits(rows: int, size: tuple[int, int]) -> bool:
        return all(GraphKey(plan.value, CallShape(rows, *size)) in calls for plan in SLAB_PLANS)

    sizes = engine.options.warm_sizes
    return {size: max((rows for rows in engine.buckets if fits(rows, size)), default=0) for size in sizes}


def tell_capacity(engine: CudaEngine) -> None:
    """Say to the log and to the metrics what fits, as the engine has it."""
    for (height, width), rows in engine.capacity.items():
        free = engine.lane.free_bytes()
        engine.observer.capacity((height, width), rows, free)
        _log.info("engine_capacity", height=height, width=width, rows=rows, free_bytes=free)


def _kernels_win(engine: CudaEngine, plan: Plan) -> bool | None:
    """True if the form on the kernels is faster, and draws what torch's form draws; None if it fails."""
    try:
        trial = _try_forms(engine, plan, timed=True)
    except Exception as error:
        # Triton has errors of its own: a kernel that it cannot compile, or that takes more than this GPU has.
        _raise_unless_other(error)
        _log.error("layer_form_failed", plan=plan.value, serves="torch", exc_info=error)
        engine.graphs.forget(plan.value)
        return None
    if trial.right:
        _log.info("layer_form", **trial.told())
    else:
        _log.error("layer_form_wrong", bound=_FORM_BOUND, serves="torch", **trial.told())
    return trial.right and (trial.kernels_ms or inf) < (trial.torch_ms or 0)


def _try_forms(engine: CudaEngine, plan: Plan, *, timed: bool) -> _Trial:
    """Run both forms of a plan; it is left on the kernels, without graphs."""
    return as_fits(engine, [plan.value], partial(_try_forms_at, engine, plan, timed=timed))


def _try_forms_at(engine: CudaEngine, plan: Plan, shape: CallShape, *, timed: bool) -> _Trial:
    times: dict[bool, float] = {}
    outputs: dict[bool, Tensor] = {}
    for kernels in (False, True):
        engine.networks.choose(plan, kernels=kernels)
        call = engine.warm_one(plan.value, shape) if timed else None
        outputs[kernels] = _example_output(engine, plan, shape.rows)
        if call is not None:
            # Of the rows of the example, which the call's buffers hold now: half of them have an adapter.
            with torch.no_grad():
                times[kernels] = _median_ms(engine.lane, call)
        # The next form is called by the same key, and would be served by this one's graph.
        engine.graphs.forget(plan.value)
    error = _difference(outputs[True], outputs[False])
    return _Trial(plan, shape.rows, error, times.get(False), times.get(True))


def _compiles_right(engine: CudaEngine, plan: Plan) -> bool:
    return as_fits(engine, [plan.value], partial(_compiles_right_at, engine, plan))


def _compiles_right_at(engine: CudaEngine, plan: Plan, shape: CallShape) -> bool:
    engine.graphs.forget(plan.value)
    plain = _example_output(engine, plan, shape.rows)
    engine.graphs.forget(plan.value)
    try:
        engine.warm_one(plan.value, shape)
        error = _difference(_example_output(engine, plan, shape.rows), plain)
    except Exception as fault:
        _raise_unless_other(fault)
        _log.error("compiled_form_failed", plan=plan.value, serves="torch's kernels", exc_info=fault)
        return False
    told = {"plan": plan.value, "rows": shape.rows, "error": error}
    # Written so that NaN does not pass.
    if error <= _FORM_BOUND:
        _log.info("compiled_form", **told)
        return True
    _log.error("compiled_form_wrong", bound=_FORM_BOUND, serves="torch's kernels", **told)
    return False


def _merged_error(engine: CudaEngine) -> float:
    """The largest difference of the merged plan from the factored one, of as many rows as can be merged at a time."""
    roles = [Plan.FACTORED.value, *(network.role for network in engine.networks.with_own_weights)]
    return as_fits(engine, roles, partial(_merged_error_at, engine))


def _merged_error_at(engine: CudaEngine, shape: CallShape) -> float:
    rows = shape.rows
    slots = range(BASE_SLOT + 1, min(engine.slots, BASE_SLOT + 1 + engine.weight_slots))
    for slot in slots:
        engine.load_row(slot, _example_row(engine, Plan.FACTORED, seed=slot))
        engine.merge(slot)
    engine.finish_merges()
    engine.lane.mark().wait()
    latents, timesteps, cross, _ = example_inputs(engine.base, rows)
    added = example_added(engine.base, rows)

    def output(plan: Plan, index: Tensor) -> Tensor:
        return engine.denoise(plan, latents, timesteps, cross, index, added).float().cpu()

    # One call of each network, so that none is captured.
    mixed = torch.tensor([slots[number % len(slots)] for number in range(rows)])
    expected = output(Plan.FACTORED, mixed)
    errors = []
    for slot in slots[:rows]:
        mine = mixed == slot
        errors.append(_difference(output(Plan.MERGED, torch.full_like(mixed, slot))[mine], expected[mine]))
    for slot in slots:
        engine.load_row(slot, EngineRow())
    for role in (Plan.FACTORED.value, *(network.role for network in engine.networks.with_own_weights)):
        engine.graphs.forget(role)
    # Not Python's, which loses NaN.
    return float(torch.tensor(errors).max())


def _raise_unless_other(error: Exception) -> None:
    """Raise an error that is no fault of the form that was tried: no memory, or a device that is gone."""
    if classify(error) is not Fault.OTHER:
        raise error


def _refuse_wrong(trial: _Trial) -> None:
    """Raise FailedPrecondition (ENGINE_PARITY) on a form that was forced and is wrong."""
    if trial.right:
        _log.info("layer_form", **trial.told())
        return
    _log.error("layer_form_wrong", bound=_FORM_BOUND, **trial.told())
    raise FailedPrecondition(
        Reason.ENGINE_PARITY,
        f"engine.kernels is on, but on this GPU the {trial.plan} plan on the kernels differs from torch by "
        f"{trial.error:.3g} of its largest output ({trial.rows} rows; allowed is {_FORM_BOUND:.3g}), so its "
        "pictures would be wrong; set engine.kernels to auto, which keeps the kernels off where they are wrong, or to "
        "off",
        metadata={"plan": trial.plan.value, "error": f"{trial.error:.3g}"},
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest output."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def _example_output(engine: CudaEngine, plan: Plan, rows: int) -> Tensor:
    """What the network of a plan makes of example inputs, half of it with an adapter of random numbers."""
    slot = BASE_SLOT + 1
    engine.load_row(slot, _example_row(engine, plan))
    # The first row has it: where only one fits, it is the adapter's layers that must be right.
    index = torch.tensor([BASE_SLOT if number % 2 else slot for number in range(rows)])
    latents, timesteps, cross, _ = example_inputs(engine.base, rows)
    added = example_added(engine.base, rows)
    if plan is Plan.FULL:
        # Masks of ones, but masks: at a map's median the last bit moves whole positions in two forms that are right.
        guides = replace(no_guides(cross), reference=torch.arange(rows) // 2 * 2)
        out, _ = engine.denoise_guided(latents, timesteps, cross, index, guides, added)
    else:
        out = engine.denoise(plan, latents, timesteps, cross, index, added)
    engine.load_row(slot, EngineRow())
    return out.float().cpu()


def _example_row(engine: CudaEngine, plan: Plan, seed: int = 0) -> EngineRow:
    """An adapter of random numbers: singular values a tenth up or down, and branches of about a hundredth of a layer's
    output.
    """
    generator, layout = torch.Generator().manual_seed(seed), engine.rows
    base = engine.row(BASE_SLOT)
    if base.spectral is None:
        raise RuntimeError("the base's row has its singular values")
    change = 1 + 0.1 * (2 * torch.rand(layout.spectral_size, generator=generator) - 1)
    branch = 0.02 * torch.randn(layout.lowrank_size, generator=generator)
    # Rows with singular values are never the dense plan's, whose forms make different things of them.
    return EngineRow(None if plan is Plan.DENSE else base.spectral.cpu() * change, branch)


def _fill_as_served(engine: CudaEngine) -> None:
    """Let every row of the calls that are timed have a slot of its own, as the users of a batch have, and a branch.

    Rows without a branch, or all of one slot's weight, cost the kernels less; so does a GPU's power on zeros.
    """
    for slot in range(BASE_SLOT + 1, min(engine.slots, engine.max_batch + 1)):
        engine.load_row(slot, EngineRow())
    engine.finish_rows()
    shape = form_shapes(engine)[0]
    latents, timesteps, cross, index = example_inputs(engine.base, shape.rows)
    views = engine.buffers.at(CallShape(engine.max_batch, latents.shape[2], latents.shape[3]))
    slots = torch.arange(engine.max_batch) % (engine.slots - 1) + BASE_SLOT + 1
    with engine.lane.running():
        views.fill(latents, timesteps, cross, example_added(engine.base, shape.rows), index, index)
        views.slots.copy_(slots)
        views.branches.copy_(slots)


def _merge_ms(engine: CudaEngine) -> float:
    if not engine.weight_slots:
        return inf
    slot = BASE_SLOT + 1

    def again() -> None:
        engine.load_row(slot, EngineRow())
        engine.merge(slot)
        engine.finish_merges()

    again()
    return _median_ms(engine.lane, again)


def _overhead_ms(engine: CudaEngine, times: Mapping[tuple[Plan, int, tuple[int, int]], float]) -> float:
    """What a call takes beside its graph: copies in and out, and the host's work where that is not hidden."""
    inputs, added = example_inputs(engine.base, 1), example_added(engine.base, 1)
    size = (inputs[0].shape[2], inputs[0].shape[3])
    graph = times.get((Plan.DENSE, 1, size))
    if graph is None:
        return 0.0
    placed = [part.to(engine.lane.device) for part in inputs[:3]]

    def call() -> None:
        engine.denoise(Plan.DENSE, placed[0], placed[1], placed[2], inputs[3], added)

    return max(0.0, _median_ms(engine.lane, call) - graph)


def _median_ms(lane: GraphLane, work: Work) -> float:
    return lane.times_ms(work, _REPEATS)[_REPEATS // 2]
