"""Settings of a kernel that a user chooses, with the defaults.

The module imports no other module of the package, so that the help of a command appears quickly.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpec:
    """Settings for the computation and the storage of a kernel."""

    output: str = "full"
    precision: str = "float32"
    dtypes: tuple[str, ...] = ("float16", "float32")
    layout: str = "auto"
    tile_side: int | None = None
    memory_bytes: int | None = None
    replan: bool = False
    certify: bool = True  # whether to compare the finished kernel with the exact one, which gives its certificate
    per_layer: tuple[tuple[str, tuple[str, ...]], ...] | None = None  # groups with patterns; empty for each module
