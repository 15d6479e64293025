"""The certificate of a finished store: the error of its kernel, measured, and an upper bound.

Let K̃ be the stored kernel, K the exact kernel, and E = K̃ − K. If it does not cost more (`choice.py`), the whole K is
computed in float64, row by row, and ‖E‖_F is exact. The network is run on each sample alone, without the factors that
the tiles are computed from.

For larger kernels ‖E‖_F is estimated with a matrix V of s Gaussian vectors. K̃ V is computed in one pass over the tiles,
so that every stored entry contributes. `NTKOperator` computes K V = J (Jᵀ V) in float64, also without those factors.
‖E V‖_F / √s is an estimate of ‖E‖_F. The same estimate for each block of samples locates an error. In addition, the
kernel entries of random pairs of samples are computed with the reference, and the largest error of these entries is
reported.

A store of the output `diagonal` has one matrix per output. All are multiplied with the same V, as one tall matrix. Its
Frobenius norm is that of all matrices together.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ntkgen.checks.choice import KernelSize, compares_whole
from ntkgen.checks.judgement import Comparison, stored_error
from ntkgen.checks.pairs import KeptRows, Pairs, kernels_of, max_pair_errors
from ntkgen.checks.rows import ExactRows
from ntkgen.checks.sampling import USUAL_SAMPLING, Sampling, usual_sampling
from ntkgen.checks.whole import whole_kernel
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

    Costs one pass over the tiles per store dtype, and the passes that `choice.py` counts: for random vectors about s
    forward and 2 s backward passes per sample in float64 (m times as many for the outputs `trace` and `diagonal`), and
    one backward pass per row of a sampled pair; for the whole kernel one backward pass per row. Errors below about
    10⁻¹⁵ ‖K‖_F are rounding errors of the exact kernel. If the device of the module has no float64 (mps), the exact
    kernel is computed on the CPU.

    Args:
        store: Finished store. Its manifest names the output map of the kernel.
        model: Network of the kernel.
        inputs: Samples of the kernel, in the store's order.
        sampling: Numbers of random vectors and of pairs, their seed, and whether the whole kernel may be compared.
        report: Function that is called as the stages proceed.

    Returns:
        The certificate. Equal stores, networks, samples and samplings give equal certificates on the same machine.

    Raises:
        StoreError: If tiles are missing or damaged, or hold entries that are not finite.
        FingerprintError: If the parameters of the network differ from those of the store.
        ShapeError: If the numbers of samples or outputs differ from those of the store.
    """
    started = time.monotonic()
    require_finished(store)
    require_model(store, model)
    plan = store.manifest.plan
    comparer = _Comparer(store, model, inputs, output_map(store.manifest.output, plan.profile.num_logits), report)
    is_whole = compares_whole(sampling, KernelSize.of(plan))
    made = comparer.whole() if is_whole else comparer.sampled(sampling)
    return dataclasses.replace(made, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Comparer:
    """A stored kernel, and the network and the samples of the exact one."""

    store: KernelStore
    model: nn.Module
    inputs: Inputs
    chosen: OutputMap
    report: Report

    def whole(self) -> Certificate:
        """Compare every entry."""
        store = self.store
        exact = ExactRows.of(self.model, self.inputs, self.chosen)
        _check_size(store, exact.num_logits, self.inputs)
        identity, step = np.eye(store.grid.num_cols), self._counter()
        stored = {dtype: stored_product(store, dtype, identity, step) for dtype in store.manifest.dtypes}
        kernel = whole_kernel(exact, self.chosen.reduction, self.report)
        errors = (
            stored_error(store, dtype, Comparison(values - kernel.values, kernel.values, kernel.max_error(values)))
            for dtype, values in stored.items()
        )
        return Certificate(
            num_probes=0,
            num_pairs=store.grid.num_samples * (store.grid.num_col_samples or store.grid.num_samples),
            seed=0,
            kernel_norm=float(np.linalg.norm(kernel.values)),
            errors=tuple(errors),
            exact_dtype=exact.dtype_name,
            comparison="whole kernel",
        )

    def sampled(self, sampling: Sampling) -> Certificate:
        """Compare products with random vectors, and the entries of some pairs of samples."""
        store, chosen, dtypes = self.store, self.chosen, self.store.manifest.dtypes
        exact = exact_operator(self.model, self.inputs.x, self.inputs.against, chosen.matrix)
        _check_size(store, exact.num_outputs if chosen.matrix is None else chosen.matrix.shape[1], self.inputs)
        V, step = draw_probes(store.grid.num_cols, sampling), self._counter()
        stored = {dtype: stored_product(store, dtype, V, step) for dtype in dtypes}
        KV = exact_product(exact, chosen, V, self.report)
        pairs = Pairs.draw(store, chosen, exact.num_outputs, sampling)
        dtype_name = str(exact.dtype).removeprefix("torch.")
        rows = KeptRows(ExactRows.in_precision(self.model, self.inputs, chosen, dtype_name), chosen.reduction)
        pair_errors = max_pair_errors(store, pairs, rows, self.report)
        found = {dtype: Comparison(stored[dtype] - KV, KV, pair_errors[dtype], sampling.num_probes) for dtype in dtypes}
        return Certificate(
            num_probes=sampling.num_probes,
            num_pairs=len(pairs.places),
            seed=sampling.seed,
            kernel_norm=found[dtypes[0]].norm_of(KV),
            errors=tuple(stored_error(store, dtype, found[dtype]) for dtype in dtypes),
            exact_dtype=dtype_name,
            num_pair_outputs=pairs.num_outputs,
        )

    def _counter(self) -> Step:
        """Count the tiles of all store dtypes."""
        kernels = (kernel for dtype in self.store.manifest.dtypes for kernel in kernels_of(self.store, dtype))
        return counter(self.report, "stored product", 0, sum(len(kernel.tiles()) for kernel in kernels))


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


def _check_size(store: KernelStore, num_logits: int, inputs: Inputs) -> None:
    grid, found = store.grid, (*inputs.counts, num_logits)
    expected = (grid.num_samples, grid.num_col_samples, store.manifest.plan.profile.num_logits)
    if expected != found:
        wanted, given = (
            f"{n}{'' if other is None else f' against {other}'} samples × {m} outputs"
            for n, other, m in (expected, found)
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
