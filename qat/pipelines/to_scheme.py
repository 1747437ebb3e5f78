"""A student to another scheme: each layer fitted anew to the weight that the student computes.

Layers whose scheme stays are kept to the bit. This is for students whose grid a runtime lacks
(learned codebooks, low-rank scales); one that is trained on the runtime's grid loses nothing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.model.surgery import check_scheme, quantized_layers
from qat.quant.scheme import LayerScheme, Scheme


def layers_to_change(student: nn.Module, wanted: Scheme) -> dict[str, LayerScheme]:
    """Return the wanted scheme of each layer that has another, by name, in the model's order.

    Raises:
        ValueError: If the scheme does not fit a layer (names it), or nothing would change.
    """
    changing = {
        name: wanted.layer(name)
        for name, layer in quantized_layers(student).items()
        if layer.scheme != wanted.layer(name)
    }
    if not changing:
        raise ValueError(f"every layer is of scheme {wanted.name} already; export the student")
    for name, scheme in changing.items():
        layer = student.get_submodule(name)
        try:
            if not scheme.rank:
                scheme.groups_of(layer.in_features)
        except ValueError as error:
            raise ValueError(f"scheme {wanted.name} does not fit {name}: {error}") from error
    check_scheme_of_rest(student, wanted)
    return changing


def check_scheme_of_rest(student: nn.Module, wanted: Scheme) -> None:
    """Refuse linears that the scheme quantizes and the student has dense."""
    dense = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and wanted.layer(name) is not None
    ]
    if dense:
        check_scheme(student, wanted)
        raise ValueError(f"{dense[0]} is dense in this student; `qat init-student` quantizes it")


@torch.no_grad()
def weight_sqnr_db(student: nn.Module, names: list[str], former: Callable[[str], Tensor]) -> float:
    """Return how much stronger the former weights are than what a conversion changed, in dB.

    Args:
        student: After the conversion.
        names: Of the layers that changed.
        former: Returns a layer's weight before, (O, I).
    """
    power = noise = 0.0
    for name in names:
        before = former(name).double()
        change = student.get_submodule(name).fake_quantized_weight().double() - before
        power += float(before.square().sum())
        noise += float(change.square().sum())
    return round(10 * math.log10(power / max(noise, 1e-300)), 2)
