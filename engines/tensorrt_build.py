"""Build a TensorRT plan from an exported graph: parse, profile, timing cache, refit marks, progress."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError
from hueshift.engines.tensorrt_plans import PlanRanges

PER_MILLE = 1000
Progress = Callable[[int, int], None]
_SLABS = ("spectral_slab", "lowrank_slab")
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory")


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What to build: `refit` names the initializers that stay replaceable; none means a plan without refit."""

    graph: Path
    ranges: PlanRanges
    refit: tuple[str, ...] = ()
    timing: bytes = b""
    optimization_level: int = 3
    """TensorRT's own default; 5 builds for longer and may run faster."""

    @property
    def flags(self) -> tuple[str, ...]:
        """What the plan's identity records."""
        return (f"level={self.optimization_level}", *(("refit-individual", *self.refit) if self.refit else ()))


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """The plan's bytes, and the timing cache after the build (empty where there is none)."""

    data: bytes
    timing: bytes
    layers: int


def build_plan(trt: TensorRT, spec: BuildSpec, progress: Progress | None = None) -> BuiltPlan:
    """Build the plan of one graph on the current CUDA device: minutes of work.

    `progress(done, PER_MILLE)` is called from TensorRT's threads; an exception it raises ends the build and comes out
    here. Raises TensorRtError (parse, memory, build).
    """
    module = trt.module
    trt.forget_errors()
    builder = module.Builder(trt.logger)
    network = trt.create_network(builder)
    parse(trt, network, spec.graph)
    mark_refittable(network, spec.refit)
    config = builder.create_builder_config()
    if spec.refit:
        config.set_flag(module.BuilderFlag.REFIT_INDIVIDUAL)
    config.builder_optimization_level = spec.optimization_level
    config.add_optimization_profile(make_profile(builder, network, spec.ranges))
    timing = _attach_timing(trt, config, spec.timing)
    watch = PhaseWatch(progress or (lambda done, total: None))
    monitor = make_monitor(module, watch)
    config.progress_monitor = monitor
    data = builder.build_serialized_network(network, config)
    config.progress_monitor = None
    del monitor
    watch.check(whole=data is not None)
    if data is None:
        raise _refusal(trt)
    return BuiltPlan(bytes(data), b"" if timing is None else bytes(timing.serialize()), network.num_layers)


def parse(trt: TensorRT, network: Any, graph: Path) -> None:
    """Read the graph into `network`. Raises TensorRtError (parse) with every error of TensorRT's parser."""
    parser = trt.module.OnnxParser(network, trt.logger)
    if not parser.parse_from_file(str(graph)) or parser.num_errors:
        found = [parser.get_error(number) for number in range(parser.num_errors)]
        text = "; ".join(f"{error.desc()} (node {error.node_name() or error.node()})" for error in found)
        raise TensorRtError(
            Fallback.PARSE, f"{trt.name} {trt.version} refuses the exported graph: {text or 'no error was given'}"
        )


def mark_refittable(network: Any, names: Sequence[str]) -> None:
    """Leave these weights replaceable. Raises TensorRtError (build) if the network does not know a name."""
    unknown = [name for name in names if not network.mark_weights_refittable(name)]
    if unknown:
        raise TensorRtError(
            Fallback.BUILD, f"the parsed network has no weights named {', '.join(unknown[:4])} ({len(unknown)} in all)"
        )


def make_profile(builder: Any, network: Any, ranges: PlanRanges) -> Any:
    """Return the only profile: a refittable engine takes one, and one serves every bucket of the batch."""
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = tuple(tensor.shape)
        shapes = [shape_at(tensor.name, shape, ranges, which) for which in range(3)]
        profile.set_shape(tensor.name, *shapes)
    return profile


def shape_at(name: str, shape: Sequence[int], ranges: PlanRanges, which: int) -> tuple[int, ...]:
    """Shape of an input at the smallest (0), usual (1) or largest (2) end of the ranges; -1 is dynamic."""
    if name in _SLABS:
        return (ranges.slots, *shape[1:])
    batch = (1, max(1, ranges.max_batch // 2), ranges.max_batch)[which]
    return (batch, *(ranges.sides[which] if size < 0 else size for size in shape[1:]))


def make_monitor(module: Any, watch: "PhaseWatch") -> Any:
    """Return TensorRT's progress monitor over `watch`."""

    class _Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    return _Monitor()


class PhaseWatch:
    """Turns TensorRT's tree of phases into one number from 0 to PER_MILLE that never falls.

    Phases without a parent follow each other; each counts for half of what is left, since TensorRT does not say how
    many will come.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._left = 1.0
        self._shown = -1
        self._failure: BaseException | None = None

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside the current step of its parent."""
        with self._lock:
            above = self._phases.get(parent) if parent else None
            if above is None:
                begin, width = 1 - self._left, self._left / 2
            else:
                begin, width = above.at, above.width / above.steps
            self._phases[name] = _Phase(begin, width, max(1, steps), root=above is None)
            self._report(begin)

    def step(self, name: str, step: int) -> bool:
        """A step has ended; False tells TensorRT to stop."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min(step + 1, phase.steps)
                self._report(phase.at)
            return self._failure is None

    def finish(self, name: str) -> None:
        """A phase has ended, perhaps before its last step."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None:
                self._report(phase.begin + phase.width)
                if phase.root:
                    self._left -= phase.width

    def check(self, *, whole: bool) -> None:
        """Raise what the progress callback raised; report the end of a build that is `whole`."""
        if whole:
            with self._lock:
                self._report(1.0)
        if self._failure is not None:
            raise self._failure

    def _report(self, share: float) -> None:
        value = int(share * PER_MILLE)
        if value <= self._shown or self._failure is not None:
            return
        self._shown = value
        try:
            self._progress(value, PER_MILLE)
        except BaseException as error:
            # It must not pass through TensorRT's frames: it ends the build and is raised after it.
            self._failure = error


@dataclass(slots=True)
class _Phase:
    begin: float
    width: float
    steps: int
    root: bool
    done: int = 0

    @property
    def at(self) -> float:
        return self.begin + self.width * self.done / self.steps


def _attach_timing(trt: TensorRT, config: Any, data: bytes) -> Any:
    """Give the build what earlier ones measured; a cache of another device or version is left out."""
    if not trt.has_timing_cache:
        return None
    for content in (data, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _refusal(trt: TensorRT) -> TensorRtError:
    text = trt.errors()
    if any(mark in text.lower() for mark in _OUT_OF_MEMORY):
        return TensorRtError(
            Fallback.MEMORY,
            f"the GPU's memory was too small to build the plan ({text}); lower engine.max_batch or limits.max_size, or "
            "build with `hueshift engine build` while nothing else uses the GPU",
        )
    return TensorRtError(Fallback.BUILD, f"{trt.name} {trt.version} could not build the plan: {text}")
