"""Which layers a job may train, so that what it makes can be served: asked before it is queued."""

from collections.abc import Callable, Collection, Mapping, Sequence

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.rows import RowLayout
from hueshift.engines.text_side import is_text_side
from hueshift.training.defaults import with_targets
from hueshift.training.methods.residuals import RESIDUAL_TARGET, residual_rank
from hueshift.training.spec import LoraInit, Method, TrainingSpec

TargetFit = Callable[[TrainingSpec, Collection[str]], TrainingSpec]
"""(spec, names of the settings that were asked for) -> the spec with targets that this server can serve."""

# Wherever the engine's branches are, these are read from the prompt, with any rank.
_TEXT_SIDE = ("attn2.to_k", "attn2.to_v")


def served_targets(lowrank_targets: Sequence[str]) -> tuple[str, ...]:
    """All that a server with these branches serves low-rank changes of."""
    return (*_TEXT_SIDE, *lowrank_targets)


def make_target_fit(rows: RowLayout) -> TargetFit:
    """Return a function that fills in a spec's targets, and refuses those that the engine over `rows` does not serve.

    It raises InvalidArgument naming `settings.targets`, `settings.rank` or `method`.
    """
    layout, served = rows.layout, rows.served_ranks

    def fit(spec: TrainingSpec, asked: Collection[str]) -> TrainingSpec:
        if spec.method is Method.RESIDUALS:
            _check_residuals(layout, served)
        if spec.method not in (Method.LORA, Method.DREAMBOOTH):
            return spec
        if "targets" not in asked and (spec.method is Method.DREAMBOOTH or _unserved(layout, spec, served)):
            spec = with_targets(spec, served_targets(rows.lowrank_targets), asked)
        problems = _unserved(layout, spec, served)
        if problems:
            text = "; ".join(f"{problem.field}: {problem.description}" for problem in problems)
            raise InvalidArgument(Reason.INVALID_FIELD, text, violations=problems)
        return spec

    return fit


def _unserved(layout: BaseLayout, spec: TrainingSpec, served: Mapping[str, int]) -> list[FieldViolation]:
    needed = spec.rank * (2 if spec.method is Method.LORA and spec.lora_init is LoraInit.PISSA else 1)
    for ending in spec.targets:
        layers = _fitting(layout, ending)
        if not layers:
            return [FieldViolation("settings.targets", f"{ending!r} fits no layer of this base model")]
        for layer in layers:
            if layer.name not in served:
                return [
                    FieldViolation(
                        "settings.targets",
                        f"{ending!r} fits {layer.name}, which this server cannot serve a low-rank change of; allowed: "
                        f"{', '.join(_TEXT_SIDE)} and layers of the setting engine.lowrank_targets",
                    )
                ]
            if not is_text_side(layer.name) and min(needed, layer.rank) > served[layer.name]:
                return [
                    FieldViolation(
                        "settings.rank",
                        f"the adapter would have rank {needed} on {layer.name}; this server serves at most "
                        f"{served[layer.name]} there (setting engine.lowrank_rank)",
                    )
                ]
    return []


def _check_residuals(layout: BaseLayout, served: Mapping[str, int]) -> None:
    for layer in _fitting(layout, RESIDUAL_TARGET):
        rank = residual_rank(layer.rows, layer.cols)
        if rank > served.get(layer.name, 0):
            raise InvalidArgument.for_field(
                "method",
                f"residuals have rank {rank} on {layer.name}; this server serves {served.get(layer.name, 0)} there: "
                "set engine.lowrank_targets and engine.lowrank_rank, or use another method",
            )


def _fitting(layout: BaseLayout, ending: str) -> list[MatrixLayer]:
    return [layer for layer in layout.matrices if layer.name == ending or layer.name.endswith(f".{ending}")]
