"""Time the kernel of neural-tangents for the network in a folder. `structured_derivatives.py` calls this program."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def forward_of(layers: list[dict[str, Any]], jax: Any) -> Callable[[Any, Any], Any]:
    """Write a sequence of layers as a function of weights and samples."""
    numpy, lax = jax.numpy, jax.lax

    def step(layer: dict[str, Any], own: Any, x: Any) -> Any:
        kind, pads = layer["kind"], [(layer["padding"],) * 2] * 2
        if kind == "Conv2d":
            found = lax.conv_general_dilated(x, own[0], (1, 1), pads, dimension_numbers=("NCHW", "OIHW", "NCHW"))
            return found + own[1].reshape(1, -1, 1, 1)
        if kind == "MaxPool2d":
            return lax.reduce_window(x, -numpy.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return {
            "ReLU": lambda: numpy.maximum(x, 0),
            "Tanh": lambda: numpy.tanh(x),
            "Flatten": lambda: x.reshape(len(x), -1),
            "Linear": lambda: x @ own[0].T + own[1],
        }[kind]()

    def forward(weights: Any, x: Any) -> Any:
        for layer, own in zip(layers, weights, strict=True):
            x = step(layer, own, x)
        return x

    return forward


def main(folder: Path, trials: int) -> None:
    """Print the seconds of each trial, and write the kernel in the order of ntkgen, sample by sample."""
    jax, library = importlib.import_module("jax"), importlib.import_module("neural_tangents")
    layers, arrays = json.loads((folder / "layers.json").read_text(encoding="utf-8")), np.load(folder / "arrays.npz")
    weights = [
        [jax.numpy.asarray(arrays[f"{number}_{index}"]) for index in range(layer["params"])]
        for number, layer in enumerate(layers)
    ]
    x, structured = jax.numpy.asarray(arrays["x"]), library.NtkImplementation.STRUCTURED_DERIVATIVES
    of_function = library.empirical_ntk_fn(
        forward_of(layers, jax), trace_axes=(), vmap_axes=0, implementation=structured
    )
    function = jax.jit(of_function)
    kernel, times = function(x, None, weights).block_until_ready(), []
    for _ in range(trials):
        start = time.perf_counter()
        kernel = function(x, None, weights).block_until_ready()
        times.append(time.perf_counter() - start)
    n, _, m, _ = kernel.shape
    np.save(folder / "kernel.npy", np.asarray(kernel).transpose(0, 2, 1, 3).reshape(n * m, n * m))
    print(json.dumps(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
