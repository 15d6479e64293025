"""Compare kernels of wide networks with the analytic kernel of infinite width, and print or draw the errors.

    uv run python scripts/infinite_width.py [--seeds 8] [--picture width.png] [--json]

The network is f(x) = v · φ(W x / √d) / √width with standard normal weights, in NTK parametrisation, for φ = ReLU and
φ = erf. With the covariance Σ(x, x') = x · x' / d, its kernel converges to

    Θ(x, x') = E[φ(u) φ(u')] + Σ(x, x') E[φ'(u) φ'(u')],        (u, u') ~ N(0, Σ),

with an error of order 1 / √width (Jacot, Gabriel, Hongler, 2018, arXiv:1806.07572). The expectations are those of Cho,
Saul (2009) for ReLU and of Williams (1997) for erf. The table has the relative Frobenius error, its mean over seeds and
its standard error, and the slope of log error against log width.
"""

import argparse
import json
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import ntkgen

FloatArray = npt.NDArray[np.float64]
WIDTHS = (128, 512, 2048, 8192, 32768, 65536)
ACTIVATIONS = {"relu": torch.relu, "erf": torch.erf}
NUM_SAMPLES, NUM_INPUTS = 6, 8


class OneHidden(nn.Module):
    """A network with one hidden layer in NTK parametrisation."""

    def __init__(self, width: int, activation: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(width, NUM_INPUTS, generator=generator, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(1, width, generator=generator, dtype=torch.float64))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:  # (samples, d) -> (samples, 1)
        """Compute f(x)."""
        hidden = self.activation(nn.functional.linear(x, self.w / math.sqrt(NUM_INPUTS)))
        return nn.functional.linear(hidden, self.v / math.sqrt(len(self.w)))


def analytic_kernel(x: FloatArray, activation: str) -> FloatArray:  # (samples, d) -> (samples, samples)
    """Compute the kernel of infinite width."""
    covariance = x @ x.T / x.shape[1]
    variance = np.diag(covariance)
    if activation == "relu":
        scale = np.sqrt(np.outer(variance, variance))
        cosine = np.clip(covariance / scale, -1, 1)
        angle = np.arccos(cosine)
        values = scale * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
        slopes = (np.pi - angle) / (2 * np.pi)
    else:
        product = np.outer(1 + 2 * variance, 1 + 2 * variance)
        values = 2 / np.pi * np.arcsin(2 * covariance / np.sqrt(product))
        slopes = 4 / np.pi / np.sqrt(product - 4 * covariance**2)
    found: FloatArray = values + covariance * slopes
    return found


def errors(activation: str, widths: Sequence[int], num_seeds: int) -> FloatArray:  # (widths, seeds)
    """Measure the relative Frobenius error of kernels of finite width."""
    x = torch.randn(NUM_SAMPLES, NUM_INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = analytic_kernel(x.numpy(), activation)
    found: FloatArray = np.empty((len(widths), num_seeds))
    for row, width in enumerate(widths):
        for seed in range(num_seeds):
            kernel = ntkgen.ntk(OneHidden(width, activation, seed), x).numpy()
            found[row, seed] = np.linalg.norm(kernel - exact) / np.linalg.norm(exact)
    return found


def slope(widths: Sequence[int], found: FloatArray) -> float:
    """Fit the slope of log error against log width."""
    return float(np.polyfit(np.log(widths), np.log(found.mean(1)), 1)[0])


def draw(path: str, found: dict[str, FloatArray]) -> None:
    """Draw the errors against the width, with the line of 1 / √width."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for name, values in found.items():
        deviation = values.std(1, ddof=1) / math.sqrt(values.shape[1])
        axes.errorbar(WIDTHS, values.mean(1), deviation, marker="o", capsize=3, label=name)
    first = max(values.mean(1)[0] for values in found.values())
    axes.plot(WIDTHS, first * np.sqrt(WIDTHS[0] / np.array(WIDTHS)), "k--", label="1 / √width")
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="relative error of the kernel")
    axes.set_title("One hidden layer, mean ± standard error over seeds", fontsize="medium")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--picture", help="file of the picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {name: errors(name, WIDTHS, options.seeds) for name in ACTIVATIONS}
    if options.picture:
        draw(options.picture, found)
    if options.json:
        print(json.dumps({name: values.tolist() for name, values in found.items()}))
        return
    print(f"| width | {' | '.join(found)} |\n|---:|{'---:|' * len(found)}")
    for row, width in enumerate(WIDTHS):
        cells = [
            f"{values[row].mean():.2g} ± {values[row].std(ddof=1) / math.sqrt(options.seeds):.1g}"
            for values in found.values()
        ]
        print(f"| {width:,} | {' | '.join(cells)} |")
    print(f"| slope | {' | '.join(f'{slope(WIDTHS, values):.2f}' for values in found.values())} |")


if __name__ == "__main__":
    main()
