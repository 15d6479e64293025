"""What `ntkgen info` says of a store, key by key: scripts read it."""

import json

import numpy as np
import pytest
from filled import PROVENANCE, drawn, fill_store, filled

from ntkgen import cli
from ntkgen.plan.tiles import Tile
from ntkgen.store.describe import describe
from ntkgen.store.rounding import Underflow

ERROR = {
    "dtype": "float16", "error": 1.25e-3, "bound": 2.5e-3, "relative_error": 0.5, "relative_bound": 0.75,
    "allowed": 1e-3, "max_pair_error": 1e-6, "block_errors": [1e-3, 7.5e-4, 0.0], "suspicious": [1], "exceeding": [],
    "of_a_later_version": 1,
}  # fmt: skip
CERTIFICATE = {
    "num_probes": 10, "num_pairs": 16, "seed": 5, "exact_dtype": "float64", "num_pair_outputs": None,
    "kernel_norm": 1.0, "errors": [ERROR],
}  # fmt: skip


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A finished store in float16 with a certificate that finds it wrong."""
    monkeypatch.chdir(tmp_path)
    K, provenance = np.diag([1e5, 1e-3, 1e-9, 1, 1, 1, 1]), {**PROVENANCE, "mine": [1]}
    labels = np.zeros(7, int)
    store, _ = fill_store(
        "a.zarr", K, labels=labels, dtypes=("float16",), provenance=provenance, certificate=CERTIFICATE
    )
    return store


def printed(capsys, *words):
    code = cli.run([*map(str, words)])
    return code, capsys.readouterr().out


def test_the_json_of_info_is_what_scripts_know(whole, capsys):
    code, out = printed(capsys, "info", "a.zarr", "--json")
    found = json.loads(out)
    assert code == 1
    assert list(found) == [
        "store", "arrays", "layers", "quantity", "model", "dataset", "num_samples", "num_col_samples", "num_outputs",
        "num_logits", "num_params", "rows", "cols", "output", "layout", "precision", "tile_side", "tiles",
        "tiles_missing", "first_missing", "status", "stored_bytes", "scale_factors", "float16_underflow",
        "certificate", "inaccuracy", "suspicious_tiles", "predecessor_factor", "provenance", "fingerprint",
    ]  # fmt: skip
    inaccuracy = found.pop("inaccuracy")
    assert inaccuracy.startswith("The kernel at a.zarr differs from the exact one by more than rounding explains")
    assert "in blocks 1 of samples, in some of the tiles (1, 1), (0, 1), (1, 2)" in inaccuracy
    assert json.dumps(found) == json.dumps({
        "store": "a.zarr", "arrays": ["ntk_float16"], "layers": [], "quantity": "J Jᵀ", "model": "lenet",
        "dataset": "digits",
        "num_samples": 7, "num_col_samples": None, "num_outputs": 1, "num_logits": 1, "num_params": 145,
        "rows": 7, "cols": 7, "output": "full", "layout": "full", "precision": "float32", "tile_side": 3,
        "tiles": 6, "tiles_missing": 0, "first_missing": [], "status": "complete",
        "stored_bytes": whole.stored_bytes, "scale_factors": {"ntk_float16": 4.0},
        "float16_underflow": {"with_fewer_bits": 1, "vanished": 1}, "certificate": CERTIFICATE,
        "suspicious_tiles": {"float16": [[1, 1], [0, 1], [1, 2]]}, "predecessor_factor": 145**-0.5,
        "provenance": {**PROVENANCE, "mine": [1]}, "fingerprint": whole.manifest.fingerprint,
    })  # fmt: skip


def test_the_json_of_an_unfinished_store(tmp_path, capsys):
    store = filled(tmp_path / "b.zarr", drawn(output="diagonal"), skip={(0, 1), (1, 2)})
    found = json.loads(printed(capsys, "info", tmp_path / "b.zarr", "--json")[1])
    changed = {
        "tiles_missing": 2, "first_missing": [[0, 1], [1, 2]], "status": "in_progress", "scale_factors": {},
        "float16_underflow": None, "certificate": None, "inaccuracy": None, "suspicious_tiles": {},
    }  # fmt: skip
    assert {name: found[name] for name in changed} == changed
    assert describe(store).first_missing == (Tile(0, 1), Tile(1, 2))


def test_a_description_is_a_value(whole):
    found = describe(whole)
    assert found.float16_underflow == Underflow(with_fewer_bits=1, vanished=1)
    assert found.certificate is whole.manifest.certificate
    assert found.provenance.train_accuracy == 87.5
    assert (found.status, found.is_complete) == ("complete", True)
    assert found == describe(whole)


def test_the_certificate_of_a_kernel_that_lost_a_tile_is_not_shown(whole):
    (whole.path / "ntk_float16/c/0/1").unlink()
    found = describe(whole)
    assert (found.certificate, found.inaccuracy, found.is_complete) == (None, None, False)
    assert whole.manifest.certificate is not None


def test_verify_says_how_a_whole_kernel_gets_its_certificate(tmp_path, capsys):
    fill_store(tmp_path / "k.zarr", labels=np.zeros(7, int))
    assert "none yet; the same `ntkgen compute`" in printed(capsys, "verify", tmp_path / "k.zarr", "--recompute", 0)[1]
    filled(tmp_path / "u.zarr", drawn(provenance={}))
    assert "the store does not name its network" in printed(capsys, "verify", tmp_path / "u.zarr", "--recompute", 0)[1]


def test_the_command_that_finishes_a_store_is_the_one_that_made_it(tmp_path, capsys):
    for name, provenance, command in (
        ("made", {"model": "small"}, "ntkgen compute"),
        ("imported", {"imported_from": "k.bin"}, "ntkgen import"),
    ):
        filled(tmp_path / name, drawn(provenance=provenance), skip={(0, 1)})
        assert f"1 tiles, from (0, 1); finish with the same `{command}`" in printed(capsys, "info", tmp_path / name)[1]
