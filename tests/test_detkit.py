"""A store of one triangle is passed to detkit without changes, which computes the log-determinant independently."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import ntkgen

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("detkit") is None, reason="detkit is not installed: pip install 'ntkgen[detkit]'"
)

# In a process of its own: importing detkit replaces the handlers of signals, and works in the main thread alone.
SCRIPT = """
import json, sys, tempfile
import detkit, zarr

_, path, name, assume = sys.argv
with tempfile.TemporaryDirectory() as scratch:
    settings = {"triangle": "u", "assume": assume, "num_blocks": 3, "scratch_dir": scratch}
    ld, sign, diag, perm = detkit.memdet(zarr.open(path, mode="r")[name], **settings)
print(json.dumps([float(ld), float(sign)]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A kernel of 33 rows in tiles of 6, whose smallest eigenvalue float16 does not lose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 3))
    x = torch.randn(11, 20, generator=torch.Generator().manual_seed(1))
    return ntkgen.compute(
        module,
        x,
        store=tmp_path_factory.mktemp("detkit") / "k.zarr",
        dtypes=("float16", "float64"),
        precision="float64",
        layout="upper",
        tile_side=6,
        certify=False,
    )


@pytest.mark.parametrize("assume", ["sym", "spd"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_log_determinant_of_the_stored_triangle(store, dtype, assume):
    command = [sys.executable, "-c", SCRIPT, str(store.path), f"ntk_{dtype}", assume]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, sign = json.loads(done.stdout.splitlines()[-1])
    K = store.kernel(dtype)[:].astype(np.float64)
    expected_sign, expected = np.linalg.slogdet(K)
    found += len(K) * np.log(store.scale_factor(f"ntk_{dtype}"))
    assert store.manifest.layout == "upper"
    assert sign == expected_sign == 1
    assert abs(found - expected) / len(K) < 1e-10
