"""Check the words of a fine-tuning spec against the base model's tokenizer, before a job is queued."""

from collections.abc import Callable

from hueshift.engines.base_model import BaseModel
from hueshift.engines.text import TextStage
from hueshift.training.identifier import Captions
from hueshift.training.spec import TrainingSpec


def make_word_check(base: BaseModel, text: TextStage) -> Callable[[TrainingSpec], None]:
    """Return a function that raises InvalidArgument if a spec's identifier or starting words cannot be learned."""

    def check(spec: TrainingSpec) -> None:
        captions = Captions(base, text, spec)
        if captions.has_embedding:
            captions.initial()

    return check
