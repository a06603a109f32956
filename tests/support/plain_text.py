"""Prompts with learned words, encoded the plain way: the vectors become new entries of the encoder's vocabulary."""

import copy

import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel


def body(base: BaseModel, *pieces: str | int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt put together of texts and of gaps for vectors, and the places of the gaps."""
    ids = [base.tokenizer.bos_token_id]
    gaps: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            gaps += range(len(ids), len(ids) + piece)
            ids += [0] * piece
        else:
            ids += base.tokenizer(piece, add_special_tokens=False).input_ids
    ids = [*ids[: base.max_tokens - 1], base.tokenizer.eos_token_id]
    ids += [base.tokenizer.pad_token_id] * (base.max_tokens - len(ids))
    return ids, [gap for gap in gaps if gap < base.max_tokens - 1]


def encode_taught(base: BaseModel, vectors: Tensor, *pieces: str | int) -> Tensor:
    """The context [tokens, width] of such a prompt, its gaps filled with `vectors` [gaps, width] in order."""
    return encode_hidden(base, vectors, *pieces)[0]


def encode_hidden(base: BaseModel, vectors: Tensor, *pieces: str | int) -> tuple[Tensor, Tensor]:
    """The context, and the last hidden states before the final layer norm, both [tokens, width]."""
    ids, gaps = body(base, *pieces)
    encoder = copy.deepcopy(base.text_encoder, {id(weight): weight for weight in base.text_encoder.parameters()})
    table = encoder.get_input_embeddings()
    size = table.weight.shape[0]
    table.weight = torch.nn.Parameter(torch.cat([table.weight, vectors]), requires_grad=False)
    for number, gap in enumerate(gaps):
        ids[gap] = size + number
    hidden: list[Tensor] = []
    layers = [module for name, module in encoder.named_modules() if name.endswith("final_layer_norm")]
    layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        context: Tensor = encoder(torch.tensor([ids]))[0]
    return context[0], hidden[0][0]
