"""From a job's method to what it learns."""

from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.custom_diffusion import CustomDiffusion
from hueshift.training.methods.dreambooth import DreamBooth
from hueshift.training.methods.learnable import Learnable
from hueshift.training.methods.lora import make_lora
from hueshift.training.methods.residuals import make_residuals
from hueshift.training.methods.svdiff import SpectralShifts
from hueshift.training.methods.textual_inversion import WordsAlone
from hueshift.training.spec import Method, TrainingSpec


def make_learnable(spec: TrainingSpec, base: BaseModel, factors: SpectralFactors) -> Learnable:
    """Make the trainable set of the spec's method. Raises InvalidArgument if the spec does not fit the base."""
    layout = base.layout
    match spec.method:
        case Method.SVDIFF:
            norms = read_norms(layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
            return SpectralShifts(RowLayout(layout, (), 1), factors, norms, spec)
        case Method.RESIDUALS:
            return make_residuals(layout, spec)
        case Method.LORA:
            return make_lora(layout, factors, spec)
        case Method.TEXTUAL_INVERSION:
            return WordsAlone(layout, spec.learning_rate)
        case Method.CUSTOM_DIFFUSION:
            return CustomDiffusion(layout, base.unet, spec)
        case Method.DREAMBOOTH:
            return DreamBooth(layout, base.unet, spec)
