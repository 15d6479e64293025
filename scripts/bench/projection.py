"""Compare the projected time of `ntkgen compute --dry-run` with the real time of the same command.

    uv run python scripts/bench/projection.py -- --models lenet --dataset mnist --subsample 3000 --epochs 0

The options after `--` are those of `ntkgen compute`. No other program should run on the machine. The script prints the
projected and the real time in seconds, and their ratio. The exit code is 1 if they differ by more than a factor of 1.5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

# Maximum ratio of the projected and the real time.
ALLOWED = 1.5


def main() -> int:
    """Print the projected and the real time of a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("options", nargs="+", help="options of `ntkgen compute`, after --")
    options = parser.parse_args().options
    with tempfile.TemporaryDirectory(prefix="ntkgen-projection-") as folder:
        projected = _run([*options, "--out", folder, "--dry-run"])["seconds"]
        real = _run([*options, "--out", folder])["seconds"]
    ratio = projected["total"] / real
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in projected.items() if name not in {"total", "range"})
    print(f"projected {projected['total']:.1f} s ({parts}), real {real:.1f} s, ratio {ratio:.2f}")
    return 0 if 1 / ALLOWED <= ratio <= ALLOWED else 1


def _run(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "ntkgen", "compute", *options, "--json", "--quiet"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
