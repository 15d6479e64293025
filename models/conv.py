"""Convolutions with batch norm, and their initialisation.

He initialisation is Gaussian with variance 2 / fan out, as in the code published with ResNet, WRN and DenseNet. It is
also used for VGG and the MobileNets. PyTorch's default reduces the signal at every layer. Without batch statistics (in
an untrained network in evaluation mode) the output would then hardly depend on the input.

References:
    He, Zhang, Ren, Sun (2015), arXiv:1502.01852, equation 14.
    Ioffe, Szegedy (2015), arXiv:1502.03167.
"""

import math

from torch import nn


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, groups: int = 1, bias: bool = False
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Build a convolution and its batch norm. The padding keeps height and width, except for the stride."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
    return conv, nn.BatchNorm2d(out_channels)


def he_normal(network: nn.Sequential) -> nn.Sequential:
    """Draw the weights of every convolution from N(0, 2 / fan out), zero its bias, and return the network."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def fan_in_normal(network: nn.Sequential) -> nn.Sequential:
    """Draw convolutions from N(0, 2 / fan in), linear layers from N(0, 1 / fan in), zero biases, return the network.

    The network of Dohare et al. (2024), Nature 632, is drawn so.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = 2 if isinstance(module, nn.Conv2d) else 1
            nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
