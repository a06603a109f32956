"""Which layers a job may train, so that what it makes can be served: asked before it is queued."""

from collections.abc import Callable, Collection, Mapping, Sequence

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.rows import RowLayout
from hueshift.engines.text_side import is_text_side
from hueshift.training.defaults import with_targets
from hueshift.training.methods.residuals import RESIDUAL_TARGET, residual_rank
from hueshift.training.spec import LoraInit, Method, TrainingSpec

TargetFit = Callable[[TrainingSpec, Collection[str], bool], TrainingSpec]
"""(spec, names of the settings that were asked for, whether what is not served will do) -> the spec with targets that
this server can serve, or that it can make at least."""

# Wherever the engine's branches are, these are read from the prompt, with any rank.
_TEXT_SIDE = ("attn2.to_k", "attn2.to_v")


def served_targets(lowrank_targets: Sequence[str]) -> tuple[str, ...]:
    """All that a server with these branches serves low-rank changes of."""
    return (*_TEXT_SIDE, *lowrank_targets)


def make_target_fit(rows: RowLayout, dense_slots: Callable[[], int]) -> TargetFit:
    """Return a function that fills in a spec's targets, and refuses those that the engine over `rows` does not serve.

    `dense_slots` tells how many mixes with whole changes the engine serves at a time: it may change while it runs. The
    function raises InvalidArgument naming `settings.targets`, `settings.rank` or `method`.
    """
    layout, served = rows.layout, rows.served_ranks

    def fit(spec: TrainingSpec, asked: Collection[str], unserved: bool = False) -> TrainingSpec:
        if spec.method is Method.RESIDUALS and not unserved:
            _check_residuals(layout, served)
        if spec.method not in (Method.LORA, Method.DREAMBOOTH):
            return spec
        whole = spec.method is Method.DREAMBOOTH and spec.rank == 0
        # Weights of its own take whole changes of every layer, as the paper trains them, so nothing is filled in.
        if "targets" not in asked and not whole:
            unfit = _unknown(layout, spec) or _unserved(layout, spec, served)
            if spec.method is Method.DREAMBOOTH or unfit:
                spec = with_targets(spec, served_targets(rows.lowrank_targets), asked)
        problems = _unknown(layout, spec)
        if not problems and not unserved:
            problems = _unserved_whole(layout, spec, dense_slots()) if whole else _unserved(layout, spec, served)
        if problems:
            text = "; ".join(f"{problem.field}: {problem.description}" for problem in problems)
            raise InvalidArgument(Reason.INVALID_FIELD, text, violations=problems)
        return spec

    return fit


def _unknown(layout: BaseLayout, spec: TrainingSpec) -> list[FieldViolation]:
    for ending in spec.targets:
        if not _fitting(layout, ending):
            return [FieldViolation("settings.targets", f"{ending!r} fits no layer of this base model")]
    return []


def _unserved_whole(layout: BaseLayout, spec: TrainingSpec, dense_slots: int) -> list[FieldViolation]:
    layers = [layer for ending in spec.targets for layer in _fitting(layout, ending)] or layout.matrices
    if dense_slots > 0 or all(is_text_side(layer.name) for layer in layers):
        return []
    return [
        FieldViolation(
            "settings.rank",
            "0 given, which keeps whole changes of weights; this server's engine cannot draw with those as it is set "
            f"up. Give 1 to 128, name only {' and '.join(_TEXT_SIDE)} as targets, set allow_unserved to have the file "
            "all the same, or use a server whose setting engine.kind is torch (on a GPU with engine.merged_slots above "
            "0)",
        )
    ]


def _unserved(layout: BaseLayout, spec: TrainingSpec, served: Mapping[str, int]) -> list[FieldViolation]:
    needed = spec.rank * (2 if spec.method is Method.LORA and spec.lora_init is LoraInit.PISSA else 1)
    for ending in spec.targets:
        for layer in _fitting(layout, ending):
            if layer.name not in served:
                return [
                    FieldViolation(
                        "settings.targets",
                        f"{ending!r} fits {layer.name}, which this server cannot serve a low-rank change of; allowed: "
                        f"{', '.join(_TEXT_SIDE)} and layers of the setting engine.lowrank_targets, or any with "
                        "allow_unserved, for the file alone",
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
