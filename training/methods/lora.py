"""LoRA (Hu et al. 2021): B A of one rank on chosen linear and 1x1 layers, scaled by alpha / rank."""

from hueshift.adapters.errors import InvalidArgument
from hueshift.adapters.layout import BaseLayout
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.branches import Branches, pissa
from hueshift.training.spec import LoraInit, Method, TrainingSpec


def make_lora(layout: BaseLayout, factors: SpectralFactors, spec: TrainingSpec) -> Branches:
    """Make the branches of a job. The rank on a layer is at most half of its own with PISSA, else its own.

    Raises InvalidArgument naming `settings.targets` if an ending fits no layer or a convolution wider than 1x1.
    """
    principal = spec.lora_init is LoraInit.PISSA
    try:
        rows = RowLayout(layout, spec.targets, spec.rank * (2 if principal else 1))
    except InvalidArgument as error:
        raise InvalidArgument.for_field("settings.targets", error.violations[0].description) from error
    ranks = {target.name: max(1, target.rank // 2) if principal else target.rank for target in rows.targets}
    scale = spec.alpha / spec.rank
    return Branches(
        Method.LORA,
        rows,
        ranks,
        spec.learning_rate,
        scale=scale,
        principal=pissa(factors, ranks, scale) if principal else None,
    )
