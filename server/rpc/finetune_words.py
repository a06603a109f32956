"""Check the words of a fine-tuning spec against the base model's tokenizer, before a job is queued."""

import copy
from collections.abc import Callable

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.training.checks import subject_path
from hueshift.training.conditions import check_base
from hueshift.training.defaults import check_identifier
from hueshift.training.spec import TrainingSpec


def make_word_check(base: BaseModel) -> Callable[[TrainingSpec], None]:
    """Return a function that raises InvalidArgument if a spec's identifiers or starting words cannot be learned, or if
    they are to differ by layer in an SDXL model."""
    # A tokenizer of its own: Rust tokenizers refuse to be changed while another thread encodes.
    tokenizer = copy.deepcopy(base.tokenizer)
    special = frozenset(tokenizer.all_special_ids)

    def check(spec: TrainingSpec) -> None:
        check_base(spec, base)
        for number, subject in enumerate(spec.subjects):
            path = subject_path(number)
            if spec.learn_identifier or subject.identifier_init:
                check_identifier(subject.identifier, tokenizer, f"{path}identifier")
            for index, word in enumerate(subject.identifier_init):
                tokens = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
                if not tokens or special & set(tokens):
                    raise InvalidArgument.for_field(
                        f"{path}identifier_init[{index}]",
                        f"{word[:80]!r} is not made of words of the base model's vocabulary; leave it out",
                    )

    return check
