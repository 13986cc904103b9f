"""The rules of convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..contributions.convolution import Convolution
from ..contributions.factor import Factor
from ..convolutions import Geometry


def convolution(
    module: nn.modules.conv._ConvNd, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor | Factor]:
    """dW_i is the weight gradient of the convolution of sample i, and db_i the sum of e_i over space."""
    x, padding = inputs[0], module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)
    return _contributions(module, output_grad, x, output_grad, padding)


def transposed_convolution(
    module: nn.modules.conv._ConvNd, inputs: tuple[Tensor, ...], output_grad: Tensor
) -> dict[str, Tensor | Factor]:
    """The adjoint of a convolution, in which the input and the output gradient change places."""
    return _contributions(module, output_grad, output_grad, inputs[0], module.padding)  # type: ignore[arg-type]  # no string here


def _contributions(
    module: nn.modules.conv._ConvNd, output_grad: Tensor, images: Tensor, grads: Tensor, padding: tuple[int, ...]
) -> dict[str, Tensor | Factor]:
    """Those of a layer whose weight gradient is that of a convolution of `images` with the output gradients `grads`."""
    contributions: dict[str, Tensor | Factor] = {}
    if module.weight.requires_grad:  # frozen weights are common, and the weight takes nearly all of the time
        geometry = Geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        contributions["weight"] = Convolution(grads, images, module.weight.shape, geometry)
    if module.bias is not None:
        contributions["bias"] = output_grad.sum(tuple(range(2, output_grad.ndim)))
    return contributions
