"""The model zoo: networks for 32×32 RGB images, (samples, 3, 32, 32) → (samples, num_classes) logits.

Each file has one family, and imports only torch. Parameters are drawn from torch's global generator, so they are
determined by a call of ``torch.manual_seed`` before.

>>> MODELS["lenet"](num_classes=7)[-1]
Linear(in_features=84, out_features=7, bias=True)
>>> MODELS["lenet"].paper
'LeCun, Bottou, Bengio, Haffner (1998), Proceedings of the IEEE 86(11)'
>>> [name for name, entry in MODELS.items() if entry.has_width][:2]
['resnet9', 'resnet18']
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models import (
    cnn,
    densenet,
    lenet,
    logistic,
    mlp,
    mobilenet,
    mobilenetv2,
    ntk_rnn,
    resnet,
    stream,
    vgg,
    wide_resnet,
)

__all__ = ["MODELS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One entry of the zoo. A call builds the network."""

    factory: Callable[..., nn.Module]
    """A function of ``num_classes``, of ``width`` if ``has_width``, and perhaps of other options."""
    paper: str
    """Authors, year, and venue or arXiv number."""

    @property
    def options(self) -> list[str]:
        """Names of the options of the factory, except ``num_classes``."""
        return [name for name in inspect.signature(self.factory).parameters if name != "num_classes"]

    @property
    def has_width(self) -> bool:
        """Whether the factory has the argument ``width``, the number of channels of the first stage."""
        return "width" in self.options

    def __call__(self, num_classes: int = 10, **options: int | str) -> nn.Module:
        """Build the network with new random parameters, in training mode."""
        return self.factory(num_classes=num_classes, **options)


MODELS: dict[str, Entry] = {
    "resnet9": Entry(resnet.resnet9, resnet.PAPER),
    "resnet18": Entry(resnet.resnet18, resnet.PAPER),
    "resnet34": Entry(resnet.resnet34, resnet.PAPER),
    "resnet50": Entry(resnet.resnet50, resnet.PAPER),
    "resnet68": Entry(resnet.resnet68, resnet.PAPER),
    "resnet101": Entry(resnet.resnet101, resnet.PAPER),
    "resnet152": Entry(resnet.resnet152, resnet.PAPER),
    "resnet10-bias": Entry(resnet.resnet10_bias, resnet.PAPER_WITH_BIAS),
    "resnet18-bias": Entry(resnet.resnet18_bias, resnet.PAPER_WITH_BIAS),
    "mobilenet": Entry(mobilenet.mobilenet, mobilenet.PAPER),
    "mobilenetv2": Entry(mobilenetv2.mobilenetv2, mobilenetv2.PAPER),
    "vgg11": Entry(vgg.vgg11, vgg.PAPER),
    "vgg13": Entry(vgg.vgg13, vgg.PAPER),
    "lenet": Entry(lenet.lenet, lenet.PAPER),
    "wrn-28-2": Entry(wide_resnet.wrn_28_2, wide_resnet.PAPER),
    "wrn-28-5": Entry(wide_resnet.wrn_28_5, wide_resnet.PAPER),
    "wrn-28-10": Entry(wide_resnet.wrn_28_10, wide_resnet.PAPER),
    "resnet20": Entry(resnet.resnet20, resnet.PAPER),
    "resnet32": Entry(resnet.resnet32, resnet.PAPER),
    "resnet56": Entry(resnet.resnet56, resnet.PAPER),
    "mlp": Entry(mlp.mlp, mlp.PAPER),
    "ntk-rnn": Entry(ntk_rnn.ntk_rnn, ntk_rnn.PAPER),
    "cnn": Entry(cnn.cnn, cnn.PAPER),
    "logistic": Entry(logistic.logistic, logistic.PAPER),
    "lenet-stream": Entry(stream.lenet_stream, stream.PAPER),
    "mlp-stream": Entry(stream.mlp_stream, stream.PAPER),
    "densenet121": Entry(densenet.densenet121, densenet.PAPER),
}
"""All networks by name."""
