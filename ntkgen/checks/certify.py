"""The certificate of a finished store: the error of its kernel, measured with random vectors, and an upper bound.

Let K̃ be the stored kernel, K the exact kernel, E = K̃ − K, and V a matrix of s Gaussian vectors. K̃ V is computed in one
pass over the tiles, so that every stored entry contributes. `NTKOperator` computes K V = J (Jᵀ V) in float64, without
the factors that the tiles are computed from. ‖E V‖_F / √s is an estimate of ‖E‖_F. The same estimate for each block of
samples locates an error. In addition, the kernel entries of random pairs of samples are computed with the reference,
and the largest error of these entries is reported.

A store of the output `diagonal` has one matrix per output. All are multiplied with the same V, as one tall matrix. Its
Frobenius norm is that of all matrices together.
"""

import dataclasses
import time
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ntkgen.checks.judgement import norm_of, stored_error
from ntkgen.checks.pairs import Pairs, ReferenceRows, kernels_of, max_pair_errors
from ntkgen.checks.sampling import USUAL_SAMPLING, Sampling, usual_sampling
from ntkgen.errors import FingerprintError, ModelError, ShapeError, StoreError
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.inputs import Inputs
from ntkgen.jacobian.operator import NTKOperator
from ntkgen.jacobian.outputs import OutputMap, output_map
from ntkgen.progress import Report, Step, counter, ignore_report, ignore_step
from ntkgen.store.certificate import Certificate
from ntkgen.store.store import KernelStore

FloatArray = npt.NDArray[np.float64]


# the driver -----------------------------------------------------------------------------------------------------------


def certify(
    store: KernelStore,
    model: nn.Module,
    inputs: Inputs,
    sampling: Sampling = USUAL_SAMPLING,
    *,
    report: Report = ignore_report,
) -> Certificate:
    """Compare a finished store with the exact kernel of a network and its samples.

    Costs one pass over the tiles per store dtype, about s forward and 2 s backward passes per sample in float64 (m
    times as many for the outputs `trace` and `diagonal`), and one backward pass per row of a sampled pair. Errors below
    about 10⁻¹⁵ ‖K‖_F are rounding errors of the operator. If the device of the module has no float64 (mps), the exact
    products are computed on the CPU.

    Args:
        store: Finished store. Its manifest names the output map of the kernel.
        model: Network of the kernel.
        inputs: Samples of the kernel, in the store's order.
        sampling: Numbers of random vectors and of pairs, and their seed.
        report: Function that is called as the stages proceed.

    Returns:
        The certificate. Equal stores, networks, samples and samplings give equal certificates on the same machine.

    Raises:
        StoreError: If tiles are missing or damaged, or hold entries that are not finite.
        FingerprintError: If the parameters of the network differ from those of the store.
        ShapeError: If the numbers of samples or outputs differ from those of the store.
    """
    started = time.monotonic()
    grid, dtypes = store.grid, store.manifest.dtypes
    require_finished(store)
    require_model(store, model)
    chosen = output_map(store.manifest.output, store.manifest.plan.profile.num_logits)
    exact = exact_operator(model, inputs.x, inputs.against, chosen.matrix)
    _check_size(store, chosen, exact, inputs)
    V = draw_probes(grid.num_cols, sampling)
    num_tiles = sum(len(kernel.tiles()) for dtype in dtypes for kernel in kernels_of(store, dtype))
    step = counter(report, "stored product", 0, num_tiles)
    stored = {dtype: stored_product(store, dtype, V, step) for dtype in dtypes}
    KV = exact_product(exact, chosen, V, report)
    pairs = Pairs.draw(store, chosen, exact.num_outputs, sampling)
    pair_errors = max_pair_errors(store, pairs, ReferenceRows.of(model, inputs, chosen, exact), report)
    errors = tuple(stored_error(store, dtype, stored[dtype] - KV, KV, pair_errors[dtype]) for dtype in dtypes)
    return Certificate(
        sampling.num_probes,
        len(pairs.places),
        sampling.seed,
        norm_of(KV),
        errors,
        exact_dtype=str(exact.dtype).removeprefix("torch."),
        num_pair_outputs=pairs.num_outputs,
        seconds=time.monotonic() - started,
    )


def exact_operator(
    model: nn.Module,
    x1: Tensor,  # (n₁, …)
    x2: Tensor | None = None,  # (n₂, …)
    transform: Tensor | None = None,  # (outputs, logits)
) -> NTKOperator:
    """Make an operator of the exact kernel in float64, or in float32 if the network cannot be run in float64.

    Raises:
        ModelError: If the network can be run in neither dtype.
    """
    try:
        return NTKOperator(model, x1, x2, transform=transform)
    except ModelError:
        return NTKOperator(model, x1, x2, transform=transform, precision="float32")


def add_certificate(
    store: KernelStore,
    model: nn.Module,
    inputs: Inputs,
    sampling: Sampling | None = None,
    *,
    report: Report = ignore_report,
) -> Certificate:
    """Certify a finished store, and write the certificate into it. The caller must hold the lock of the store."""
    num_logits = store.manifest.plan.profile.num_logits
    sampling = sampling or usual_sampling(store.manifest.output, num_logits)
    measured = certify(store, model, inputs, sampling, report=report)
    store.finalize()  # again, because writing an attribute of a reopened group would drop its consolidated metadata
    # This process judges the kernel by the rounded values of the file, like every later process.
    stored = Certificate.from_json(measured.to_json())
    store.set_manifest(dataclasses.replace(store.manifest, certificate=stored))
    return measured


def forget_certificate(store: KernelStore) -> None:
    """Remove the certificate of a store before its tiles change. The caller must hold the lock of the store."""
    if store.manifest.certificate is not None:
        store.set_manifest(dataclasses.replace(store.manifest, certificate=None))


def require_finished(store: KernelStore) -> None:
    """Refuse a store that cannot be certified, because tiles are missing.

    Raises:
        StoreError: If tiles are missing.
    """
    if missing := store.missing_tiles():
        first = ", ".join(f"({tile.row}, {tile.col})" for tile in missing[:5])
        raise StoreError(
            f"The store at {store.name} has no certificate (no measured error bound) yet: expected all of its "
            f"{store.grid.num_tiles} tiles, and {len(missing)} are missing ({first}"
            f"{', …' if len(missing) > 5 else ''}). Was its computation interrupted? Run the same `ntkgen compute` "
            "again first."
        )


def require_model(store: KernelStore, model: nn.Module) -> None:
    """Refuse a network whose parameters differ from those of the store. An imported store does not name its parameters.

    Raises:
        FingerprintError: If the parameters differ.
    """
    stored = store.manifest.identity.get("parameters")
    if stored is not None and stored != (given := parameter_fingerprint(model)):
        raise FingerprintError(
            f"The store at {store.name} was made from other parameters: expected the fingerprint {stored[:8]}…, found "
            f"{given[:8]}… for this network. Its error would be measured against another kernel. Is this another "
            "checkpoint, or was the network trained or cast since? Load the checkpoint that the store's provenance "
            "names."
        )


def _check_size(store: KernelStore, chosen: OutputMap, exact: NTKOperator, inputs: Inputs) -> None:
    grid, (rows, cols) = store.grid, inputs.counts
    outputs = grid.num_outputs if chosen.reduction == "none" else store.manifest.plan.profile.num_logits
    expected = (grid.num_samples, grid.num_col_samples, outputs)
    if expected != (rows, cols, exact.num_outputs):
        wanted, given = (
            f"{n}{'' if other is None else f' against {other}'} samples × {m} outputs"
            for n, other, m in (expected, (rows, cols, exact.num_outputs))
        )
        raise ShapeError(
            f"The samples or outputs do not fit the store at {store.name}: expected {wanted}, found {given}. Are these "
            "other samples, or is it another network? Pass the network and the samples that the store was made from."
        )


# sampling -------------------------------------------------------------------------------------------------------------


def draw_probes(num_cols: int, sampling: Sampling) -> FloatArray:  # (cols, probes)
    """Draw the Gaussian vectors V."""
    return np.random.default_rng([sampling.seed, 0]).standard_normal((num_cols, sampling.num_probes))


# products -------------------------------------------------------------------------------------------------------------


def stored_product(
    store: KernelStore,
    dtype: str,
    V: FloatArray,  # (cols, probes)
    step: Step = ignore_step,  # called after each tile
) -> FloatArray:  # (planes, rows, probes)
    """Multiply the stored kernel of each plane with vectors, in float64, in one pass over the tiles.

    Raises:
        StoreError: If a tile is missing, damaged or not finite. The message names the tile.
    """
    return np.stack([kernel.matmat(V, step=step) for kernel in kernels_of(store, dtype)])


def exact_product(
    exact: NTKOperator,
    chosen: OutputMap,
    V: FloatArray,  # (cols, probes)
    report: Report = ignore_report,
) -> FloatArray:  # (planes, rows, probes)
    """Multiply the exact kernel of each plane with vectors.

    The kernel K_o of one output o is the part of the kernel of f in the rows and columns of that output. K_o V is
    computed by placing V in these columns, with zeros elsewhere, and taking these rows of the product. The output
    `diagonal` has all K_o, and `trace` has Σ_o K_o.
    """
    if chosen.reduction == "none":
        return _matmat(exact, V, report)[None]
    m, products = exact.num_outputs, []
    for output in range(m):
        columns = np.zeros((len(V), m, V.shape[1]))
        columns[:, output] = V
        product = _matmat(
            exact,
            columns.reshape(-1, V.shape[1]),
            partial(_report_part, report, output, m),
        )
        products.append(product.reshape(-1, m, V.shape[1])[:, output])
    return np.stack(products) if chosen.reduction == "diagonal" else np.sum(products, axis=0)[None]


def _report_part(report: Report, number: int, count: int, stage: str, done: int, total: int) -> None:
    """Report the progress of one of ``count`` equal products as part of the total."""
    report(stage, number * total + done, count * total)


def _matmat(exact: NTKOperator, V: FloatArray, report: Report) -> FloatArray:
    product: FloatArray = exact.matmat(torch.from_numpy(V), report).cpu().numpy()
    return product
