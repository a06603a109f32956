"""Networks made from shapes alone: they read another's weights, and are refused where that has not got them all."""

import pytest
import torch
from tiny_unet import TinyParts

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.interface import Plan
from hueshift.engines.weightless import check_shared, is_weightless, share_parameters, without_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def test_a_network_without_weights_draws_with_those_of_another(tiny: TinyParts) -> None:
    source = AdaptedUNet(tiny.base, tiny.factors, tiny.rows, Plan.FACTORED)
    made = AdaptedUNet(*without_weights(tiny.base, tiny.factors), tiny.rows, Plan.FACTORED)
    assert is_weightless(made)
    assert not is_weightless(source)
    share_parameters(made, source)
    check_shared(made, CPU)
    assert not is_weightless(made)
    row = tiny.row((tiny.random_adapter(1), 1.0))
    assert row.spectral is not None
    with torch.no_grad():
        found, expected = (unet.forward_rows(*tiny.inputs(2), row.spectral[None], None) for unet in (made, source))
    assert torch.equal(found, expected)
    # Bit by bit the same memory, in the same layout.
    given = dict(source.named_parameters())
    for name, parameter in made.named_parameters():
        assert (parameter.data_ptr(), parameter.stride()) == (given[name].data_ptr(), given[name].stride()), name


def test_what_no_other_network_has_is_named(tiny: TinyParts) -> None:
    source = AdaptedUNet(tiny.base, tiny.factors, tiny.rows, Plan.DENSE)
    made = AdaptedUNet(*without_weights(tiny.base, tiny.factors), tiny.rows, Plan.FACTORED)
    share_parameters(made, source)
    with pytest.raises(RuntimeError, match=r"unet\.conv_in\.u"):
        check_shared(made, CPU)
