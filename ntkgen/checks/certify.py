"""The certificate of a finished store: how far the stored kernel is from the exact one, by sampling all of it.

With K̃ what is stored, K the exact kernel and E = K̃ − K, s Gaussian vectors V are multiplied with both: with K̃ in one
pass over the tiles, so that every entry takes part, and with K = J Jᵀ by `NTKOperator` in float64, which multiplies no
factors. ‖E V‖_F / √s estimates ‖E‖_F, its parts by blocks of samples say where an error lies, and sampled pairs of
samples, recomputed with the reference, give the entrywise error.

A store of the output `diagonal` holds a matrix per output. All are multiplied with the same V, as one matrix with the
outputs below each other, whose Frobenius norm is that of all of them.
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
from ntkgen.errors import FingerprintError, ModelError, ShapeError, StoreError
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.inputs import Inputs
from ntkgen.jacobian.operator import NTKOperator
from ntkgen.jacobian.outputs import OutputMap, output_map
from ntkgen.progress import Report, Step, counter, ignore_report, ignore_step
from ntkgen.store.certificate import USUAL_SAMPLING, Certificate, Sampling, usual_sampling
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
    times as many for the outputs `trace` and `diagonal`), and a backward pass per sampled row of a pair. Below about
    10⁻¹⁵ ‖K‖_F the error is the operator's own. Where the module's device has no float64 (mps), the CPU computes.

    Args:
        store: The store; all its tiles are there. It says which output map its kernel is of.
        model: The network that the kernel is of.
        inputs: Its samples, in the store's order.
        sampling: How much is sampled.
        report: Called as the stages proceed.

    Returns:
        The certificate. The same store, network, samples and sampling give the same on the same machine.

    Raises:
        StoreError: If tiles are missing or damaged, or hold entries that are not finite.
        FingerprintError: If the store says that it was made of other parameters.
        ShapeError: If there are more or fewer samples or outputs than the store has.
    """
    started = time.monotonic()
    grid, dtypes = store.grid, store.manifest.dtypes
    require_finished(store)
    require_model(store, model)
    chosen = output_map(store.manifest.output, store.manifest.plan.profile.num_logits)
    exact = exact_operator(model, inputs.x, inputs.against, chosen.matrix)
    _check_size(store, chosen, exact, inputs)
    V = draw_probes(grid.num_cols, sampling)
    num_tiles = sum(len(kernel.places()) for dtype in dtypes for kernel in kernels_of(store, dtype))
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
    """Make the exact kernel as an operator: in float64, or where the network cannot be run in that, in float32.

    Raises:
        ModelError: If it can be run in neither.
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
    """Certify a finished store, and write the certificate into it; only under its lock."""
    num_logits = store.manifest.plan.profile.num_logits
    sampling = sampling or usual_sampling(store.manifest.output, num_logits)
    found = certify(store, model, inputs, sampling, report=report)
    store.finalize()  # again: a group opened anew would lose its gathered metadata with the next attribute
    # What the file says, rounded, is what this process judges the kernel by, as every later one does.
    kept = Certificate.from_json(found.to_json())
    store.set_manifest(dataclasses.replace(store.manifest, certificate=kept))
    return found


def forget_certificate(store: KernelStore) -> None:
    """Remove the certificate of a store whose tiles are about to change; only under its lock."""
    if store.manifest.certificate is not None:
        store.set_manifest(dataclasses.replace(store.manifest, certificate=None))


def require_finished(store: KernelStore) -> None:
    """Refuse a store that has no certificate yet.

    Raises:
        StoreError: If tiles are missing.
    """
    if missing := store.missing_tiles():
        first = ", ".join(f"({tile.row}, {tile.col})" for tile in missing[:5])
        raise StoreError(
            f"The store at {store.name} has no certificate yet: expected all of its {store.grid.num_tiles} tiles, and "
            f"{len(missing)} are missing ({first}{', …' if len(missing) > 5 else ''}). Was its computation "
            "interrupted? Run the same `ntkgen compute` again first."
        )


def require_model(store: KernelStore, model: nn.Module) -> None:
    """Refuse a network with other parameters than those that the store was made of, where it says which.

    Raises:
        FingerprintError: If they differ.
    """
    theirs = store.manifest.identity.get("parameters")
    if theirs is not None and theirs != (mine := parameter_fingerprint(model)):
        raise FingerprintError(
            f"The store at {store.name} was made from other parameters (fingerprint {theirs[:8]}…, this network "
            f"{mine[:8]}…): its error would be measured against another kernel. Is this another checkpoint, or was it "
            "trained or cast since? Load the one that the store's provenance names."
        )


def _check_size(store: KernelStore, chosen: OutputMap, exact: NTKOperator, inputs: Inputs) -> None:
    grid, (rows, cols) = store.grid, inputs.counts
    outputs = grid.num_outputs if chosen.reduction == "none" else store.manifest.plan.profile.num_logits
    expected = (grid.num_samples, grid.num_col_samples, outputs)
    if expected != (rows, cols, exact.num_outputs):
        there, here = (
            f"{n}{'' if other is None else f' against {other}'} samples × {m} outputs"
            for n, other, m in (expected, (rows, cols, exact.num_outputs))
        )
        raise ShapeError(
            f"The store at {store.name} is of {there}, and {here} are given. Are these other samples, or is it "
            "another network? Pass what it was made of."
        )


# sampling -------------------------------------------------------------------------------------------------------------


def draw_probes(num_cols: int, sampling: Sampling) -> FloatArray:  # (cols, probes)
    """Draw the Gaussian vectors."""
    return np.random.default_rng([sampling.seed, 0]).standard_normal((num_cols, sampling.num_probes))


# products -------------------------------------------------------------------------------------------------------------


def stored_product(
    store: KernelStore,
    dtype: str,
    V: FloatArray,  # (cols, probes)
    step: Step = ignore_step,  # called after each tile
) -> FloatArray:  # (planes, rows, probes)
    """Multiply the stored kernels with some vectors, in float64, in one pass over the tiles.

    Raises:
        StoreError: If a tile is missing, damaged or not finite; the message names it.
    """
    return np.stack([kernel.matmat(V, step=step) for kernel in kernels_of(store, dtype)])


def exact_product(
    exact: NTKOperator,
    chosen: OutputMap,
    V: FloatArray,  # (cols, probes)
    report: Report = ignore_report,
) -> FloatArray:  # (planes, rows, probes)
    """Multiply the exact kernels with some vectors.

    The kernel K_o of one output o is that of f between its rows and its columns: V is put into these columns, and
    these rows of the product are taken. `diagonal` is all K_o, `trace` is Σ_o K_o.
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
    """Report one of several equal products as a part of them all."""
    report(stage, number * total + done, count * total)


def _matmat(exact: NTKOperator, V: FloatArray, report: Report) -> FloatArray:
    product: FloatArray = exact.matmat(torch.from_numpy(V), report).cpu().numpy()
    return product
