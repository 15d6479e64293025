"""What a store says of itself keeps its bytes, whichever version of the program wrote it and writes it again."""

import dataclasses
import json

import numpy as np
import pytest
from filled import PROVENANCE, fill_store

import ntkgen
from ntkgen.errors import InaccurateKernelWarning, StoreError
from ntkgen.store.certificate import Certificate, StoredError
from ntkgen.store.opening import open_store
from ntkgen.store.provenance import Provenance

LABELS = np.array([0, 1, 0, 1])
OLD_ERROR = {
    "dtype": "float64", "error": 1.25e-3, "bound": 2.5e-3, "relative_error": 1e-9, "relative_bound": 2e-9,
    "max_pair_error": 1e-6, "block_errors": [1e-3, 7.5e-4], "suspicious": [],
}  # fmt: skip
# The first versions had neither `allowed` and `exceeding` of an error nor `exact_dtype` and `num_pair_outputs`.
OLD = {"num_probes": 10, "num_pairs": 16, "seed": 5, "kernel_norm": 1.0, "errors": [OLD_ERROR]}
NOW = {
    "num_probes": 10, "num_pairs": 16, "seed": 5, "exact_dtype": "float64", "num_pair_outputs": None,
    "comparison": "random vectors", "kernel_norm": 1.0, "errors": [{
        "dtype": "float64", "error": 1.25e-3, "bound": 2.5e-3, "relative_error": 1e-9, "relative_bound": 2e-9,
        "allowed": 1.5e-8, "max_pair_error": 1e-6, "block_errors": [1e-3, 7.5e-4], "suspicious": [], "exceeding": [],
    }],
}  # fmt: skip
BEFORE = {name: value for name, value in NOW.items() if name != "comparison"}  # when all were of random vectors
LATER = {"of_the_future": {"a": [1, None]}, **NOW, "errors": [{"method": "other", **NOW["errors"][0]}]}
OTHER_ORDER = dict(reversed(NOW.items()))


def with_certificate(path, certificate):
    return with_manifest(path, certificate=certificate)


def with_manifest(path, **values):
    """Make a store whose manifest on disk has some values of this text."""
    store, _ = fill_store(path, labels=LABELS)
    metadata = json.loads((store.path / "zarr.json").read_text())
    metadata["attributes"]["ntkgen"].update(values)
    (store.path / "zarr.json").write_text(json.dumps(metadata))
    return store.path


def require_same_bytes(path):
    """Write the manifest again in all ways in which the program does."""
    before = manifest_text(path)
    store = open_store(path, mode="r+")
    store.set_manifest(store.manifest)
    assert manifest_text(path) == before
    store.finalize()
    assert manifest_text(path) == before
    store.set_manifest(dataclasses.replace(store.manifest, replanned=0))
    assert manifest_text(path) == before


def manifest_text(path):
    return json.dumps(json.loads((path / "zarr.json").read_text())["attributes"]["ntkgen"])


@pytest.mark.parametrize("certificate", [OLD, BEFORE, NOW, LATER, OTHER_ORDER, None], ids=lambda _: "")
def test_a_certificate_keeps_its_bytes_when_the_manifest_is_written_again(certificate, tmp_path):
    path = with_certificate(tmp_path / "k.zarr", certificate)
    require_same_bytes(path)
    assert json.dumps(json.loads(manifest_text(path))["certificate"]) == json.dumps(certificate)


def test_a_certificate_without_an_allowed_error_is_judged_by_the_precision_of_the_kernel(tmp_path):
    path = with_certificate(tmp_path / "k.zarr", OLD)
    found = ntkgen.open(path).manifest.certificate
    assert found.errors[0].allowed == pytest.approx(1e-3 + 2**-52)  # of the plan's float32
    assert found.is_good
    wrong = with_certificate(tmp_path / "w.zarr", {**OLD, "errors": [{**OLD_ERROR, "relative_error": 2e-3}]})
    with pytest.warns(InaccurateKernelWarning, match="more than rounding explains"):
        ntkgen.open(wrong)


def test_a_stored_limit_counts_and_not_the_one_of_this_version(tmp_path):
    strict = {**NOW, "errors": [{**NOW["errors"][0], "allowed": 1e-12}]}
    with pytest.warns(InaccurateKernelWarning):
        assert not ntkgen.open(with_certificate(tmp_path / "k.zarr", strict)).manifest.certificate.is_good


def test_a_certificate_is_written_as_its_first_readers_expect_it():
    error = StoredError("float64", 1.25e-3, 2.4951e-3, 1e-9, 2e-9, 1.5e-8, 1e-6, (1e-3, 7.4999e-4), ())
    made = Certificate(10, 16, 5, 1.0004, (error,), seconds=3.0)
    assert json.dumps(made.to_json()) == json.dumps(NOW)


def test_another_certificate_made_of_a_read_one_is_written_as_it_is():
    changed = dataclasses.replace(Certificate.from_json(LATER), seed=6)
    assert json.dumps(changed.to_json()) == json.dumps({**NOW, "seed": 6})


@pytest.mark.parametrize("certificate", [[1], {}, {"errors": [{}]}, {**NOW, "errors": None}, "none"], ids=str)
def test_what_is_no_certificate_is_refused(certificate, tmp_path):
    path = with_certificate(tmp_path / "k.zarr", certificate)
    with pytest.raises(StoreError, match="is not a kernel store"):
        open_store(path)


# provenance -----------------------------------------------------------------------------------------------------------

MADE_BY_USERS = {"lab": {"room": [1, 2]}, "model": "lenet", "seed": None, "note": "mine"}


@pytest.mark.parametrize("values", [{}, PROVENANCE, MADE_BY_USERS, {"imported_from": "k.bin"}], ids=lambda _: "")
def test_a_provenance_keeps_its_bytes_when_the_manifest_is_written_again(values, tmp_path):
    path = with_manifest(tmp_path / "k.zarr", provenance=values)
    require_same_bytes(path)
    assert json.dumps(json.loads(manifest_text(path))["provenance"]) == json.dumps(values)


def test_what_is_known_of_a_provenance_is_read_and_the_rest_kept():
    made = Provenance.of(MADE_BY_USERS)
    assert (made.model, made.seed, made.dataset, made.is_empty) == ("lenet", None, None, False)
    assert made != Provenance.of({**MADE_BY_USERS, "note": "other"})
    assert Provenance().is_empty
    assert Provenance(model="lenet", seed=0).to_json() == {"model": "lenet", "seed": 0}
    assert dataclasses.replace(made, seed=3).to_json() == {"model": "lenet", "seed": 3}


def test_every_key_that_the_command_writes_is_one_that_is_read():
    made = Provenance.of(PROVENANCE)
    unread = [name for name in PROVENANCE if not hasattr(made, name)]
    assert unread == ["train_loss"]  # for users alone


@pytest.mark.parametrize("values", [[], [1], "", None], ids=repr)
def test_what_is_no_provenance_is_refused(values, tmp_path):
    with pytest.raises(StoreError, match="is not a kernel store"):
        open_store(with_manifest(tmp_path / "k.zarr", provenance=values))
