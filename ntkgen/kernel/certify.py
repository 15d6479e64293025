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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ntkgen.checkpoint import parameter_fingerprint
from ntkgen.errors import FingerprintError, ShapeError, StoreError
from ntkgen.jacobian.operator import NTKOperator
from ntkgen.jacobian.outputs import OutputMap, output_map
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.kernel.certificate import USUAL_SAMPLING, Certificate, Sampling, StoredError, upper_bound, usual_sampling
from ntkgen.kernel.inputs import Inputs
from ntkgen.kernel.store import KernelStore
from ntkgen.kernel.symmetric import SymmetricArray
from ntkgen.kernel.tiles import Block, TileGrid

# A block of samples is suspicious whose error is so many times what rounding explains.
SUSPICIOUS_RATIO = 10.0
# Rounding to a store dtype changes x by at most x times the first, and by at most the second below its normal numbers.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
HALF_SUBNORMAL = {"float16": 2.0**-25, "float32": 2.0**-150, "float64": 0.0}
# Rounding once to what is kept of a sample changes it by so much.
POLICY_ROUNDOFF = {
    "float64": 2.0**-53,
    "float64-accumulate": 2.0**-24,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "bfloat16": 2.0**-9,
}

FloatArray = npt.NDArray[np.float64]
# Called with what is being done ("stored product", "exact product" or "pairs"), how much of it is done, and all of it.
Report = Callable[[str, int, int], None]


def ignore_report(stage: str, done: int, total: int) -> None:
    """Report nothing."""


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
    times as many for the outputs `trace` and `diagonal`), and two dense Jacobians per pair. Below about 10⁻¹⁵ ‖K‖_F the
    error is the operator's own. Where the module has no float64 (mps), the CPU computes.

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
    chosen = output_map(store.manifest.identity.get("output", "full"), store.manifest.plan.profile.num_logits)
    exact = NTKOperator(model, inputs.x, inputs.against, transform=chosen.matrix)
    _check_size(store, chosen, exact, inputs)
    V = draw_probes(grid.num_cols, sampling)
    step = counted(report, "stored product", len(dtypes) * grid.num_planes * len(_places(store)))
    stored = {dtype: stored_product(store, dtype, V, step) for dtype in dtypes}
    KV = exact_product(exact, chosen, V, report)
    pairs = draw_pairs((grid.num_samples, grid.num_cols // grid.num_outputs), sampling)
    pair_errors = max_pair_errors(store, pairs, lambda i, j: exact_pair(model, inputs, (i, j), chosen), report)
    errors = tuple(_stored_error(store, dtype, stored[dtype] - KV, KV, pair_errors[dtype]) for dtype in dtypes)
    return Certificate(
        sampling.num_probes, len(pairs), sampling.seed, _norm(KV), errors, seconds=time.monotonic() - started
    )


def add_certificate(
    store: KernelStore,
    model: nn.Module,
    inputs: Inputs,
    sampling: Sampling | None = None,
    *,
    report: Report = ignore_report,
) -> Certificate:
    """Certify a finished store, and write the certificate into it; only under its lock."""
    sampling = sampling or usual_sampling(store.manifest.identity.get("output", "full"))
    found = certify(store, model, inputs, sampling, report=report)
    store.finalize()  # again: a group opened anew would lose its gathered metadata with the next attribute
    store.set_manifest(dataclasses.replace(store.manifest, certificate=found.to_json()))
    return found


def forget_certificate(store: KernelStore) -> None:
    """Remove the certificate of a store whose tiles are about to change; only under its lock."""
    if store.manifest.certificate is not None:
        store.set_manifest(dataclasses.replace(store.manifest, certificate=None))


def counted(report: Report, stage: str, total: int) -> Callable[[], None]:
    """Make a function that counts the steps of a stage, and reports each."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        report(stage, done, total)

    return step


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


def draw_pairs(counts: tuple[int, int], sampling: Sampling) -> list[tuple[int, int]]:
    """Draw pairs of a sample of the rows and one of the columns, each at most once, from all of them.

    >>> len(draw_pairs((3, 2), Sampling(num_pairs=299)))
    6
    """
    total = counts[0] * counts[1]
    generator = np.random.default_rng([sampling.seed, 1])
    drawn = generator.choice(total, size=min(sampling.num_pairs, total), replace=False)
    return [divmod(int(number), counts[1]) for number in drawn]


# products -------------------------------------------------------------------------------------------------------------


def stored_product(
    store: KernelStore,
    dtype: str,
    V: FloatArray,  # (cols, probes)
    step: Callable[[], None] = lambda: None,  # called after each tile
) -> FloatArray:  # (planes, rows, probes)
    """Multiply the stored kernels with some vectors, in float64, in one pass over the tiles.

    Where one triangle is stored, each tile off the diagonal is used twice, as it is and transposed.

    Raises:
        StoreError: If a tile is damaged, or the product with it is not finite; the message names it.
    """
    grid, m = store.grid, store.grid.num_outputs
    is_upper = store.manifest.layout == "upper"
    product = np.zeros((grid.num_planes, grid.num_rows, V.shape[1]))
    for plane, kernel in enumerate(kernels_of(store, dtype)):
        for i, j in _places(store):
            rows, cols = grid.block(i).rows(m), grid.col_block(j).rows(m)
            values = kernel[rows, cols].astype(np.float64, copy=False)
            with np.errstate(invalid="ignore", over="ignore"):
                part = values @ V[cols]
            if not np.isfinite(part).all():
                _refuse_tile(store, f"ntk_{dtype}/c/{f'{plane}/' * (grid.num_planes > 1)}{i}/{j}", values)
            product[plane, rows] += part
            if is_upper and i != j:
                product[plane, cols] += values.T @ V[rows]
            step()
    return product


def kernels_of(store: KernelStore, dtype: str) -> list[SymmetricArray]:
    """View what is stored in one dtype as matrices: one, or one per output."""
    planes = store.grid.num_planes
    return [store.kernel(dtype, None if planes == 1 else plane) for plane in range(planes)]


def _places(store: KernelStore) -> list[tuple[int, int]]:
    """List the stored tiles, row by row."""
    grid, is_upper = store.grid, store.manifest.layout == "upper"
    return [(i, j) for i in range(grid.num_blocks) for j in range(i if is_upper else 0, grid.num_col_blocks)]


def _refuse_tile(store: KernelStore, chunk: str, values: FloatArray) -> None:
    name, place = chunk.split("/c/")
    raise StoreError(
        f"Tile ({place.replace('/', ', ')}) of {name} in {store.name} is not finite: expected numbers, found "
        f"{values.size - int(np.isfinite(values).sum())} of {values.size} entries infinite or NaN, as an empty tile "
        f"reads. Was it overwritten? Run `ntkgen verify --repair {store.name}` and then the same `ntkgen compute` "
        "again: it makes it anew."
    )


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
        return _matmat(exact, V, lambda done, total: report("exact product", done, total))[None]
    m, products = exact.num_outputs, []
    for output in range(m):
        columns = np.zeros((len(V), m, V.shape[1]))
        columns[:, output] = V
        product = _matmat(
            exact,
            columns.reshape(-1, V.shape[1]),
            lambda done, total, before=output: report("exact product", before * total + done, m * total),  # type: ignore[misc]
        )
        products.append(product.reshape(-1, m, V.shape[1])[:, output])
    return np.stack(products) if chosen.reduction == "diagonal" else np.sum(products, axis=0)[None]


def _matmat(exact: NTKOperator, V: FloatArray, report: Callable[[int, int], None]) -> FloatArray:
    product: FloatArray = exact.matmat(torch.from_numpy(V), report).cpu().numpy()
    return product


# errors ---------------------------------------------------------------------------------------------------------------


def _norm(product: FloatArray) -> float:
    """Estimate ‖A‖_F from A V, ‖A V‖_F / √s: its square has the mean ‖A‖²_F."""
    return float(np.linalg.norm(product) / np.sqrt(product.shape[-1]))


def _block_norms(
    grid: TileGrid,
    product: FloatArray,  # (planes, rows, probes)
) -> FloatArray:  # (blocks,)
    blocks = (grid.block(index).rows(grid.num_outputs) for index in range(grid.num_blocks))
    return np.array([_norm(product[:, rows]) for rows in blocks])


def _stored_error(
    store: KernelStore,
    dtype: str,
    EV: FloatArray,  # (planes, rows, probes)
    KV: FloatArray,  # (planes, rows, probes)
    max_pair_error: float,
) -> StoredError:
    """Turn the difference of the two products into what the certificate says of a store dtype."""
    error, norm = _norm(EV), _norm(KV) or 1.0  # beside a kernel of zeros the error is absolute
    bound = upper_bound(error, EV.shape[-1])
    block_errors = _block_norms(store.grid, EV)
    explained = explained_errors(store, dtype, _block_norms(store.grid, KV))
    return StoredError(
        dtype=dtype,
        error=error,
        bound=bound,
        relative_error=error / norm,
        relative_bound=bound / norm,
        max_pair_error=max_pair_error,
        block_errors=tuple(block_errors.tolist()),
        suspicious=suspicious_blocks(block_errors, explained),
    )


def explained_errors(
    store: KernelStore,
    dtype: str,
    block_norms: FloatArray,  # (blocks,): ‖K_b‖_F
) -> FloatArray:  # (blocks,)
    """Bound by how much rounding each entry once may change the rows of each block, in the Frobenius norm.

    That is u ‖K_b‖_F, with u the unit roundoff of the store dtype or of the computation, whichever is larger, and half
    a subnormal number per entry: float16 has no smaller ones for samples whose kernel is far below the largest.
    """
    grid = store.grid
    rows = np.array([len(grid.block(index)) for index in range(grid.num_blocks)]) * grid.num_outputs
    absolute = HALF_SUBNORMAL[dtype] * store.scale_factor(f"ntk_{dtype}")
    relative = max(UNIT_ROUNDOFF[dtype], POLICY_ROUNDOFF[store.manifest.plan.precision])
    return np.asarray(relative * block_norms + absolute * np.sqrt(rows * float(grid.num_cols * grid.num_planes)))


def suspicious_blocks(
    errors: FloatArray,  # (blocks,)
    explained: FloatArray,  # (blocks,)
) -> tuple[int, ...]:
    """Name the blocks whose error is out of line.

    The ratio of a block's error to what rounding once explains is at most about 1 where storing rounds most, and
    larger, but of one size for all blocks, where the computation does. Suspicious is a block with more than ten times
    the ratio of the blocks' lower quartile, and more than ten. It is the quartile because two wrong blocks of three
    would mislead the median.

    >>> suspicious_blocks(np.array([1.0, 1.2, 40.0, 0.9, 55.0]), np.full(5, 1.0))
    (2, 4)
    >>> suspicious_blocks(np.array([100.0, 120.0, 90.0]), np.full(3, 1.0))  # all alike: a less precise computation
    ()
    """
    with np.errstate(over="ignore"):
        ratios = errors / np.maximum(explained, np.finfo(np.float64).tiny)
    usual = max(1.0, float(np.quantile(ratios, 0.25, method="lower")))
    return tuple(np.flatnonzero(ratios > SUSPICIOUS_RATIO * usual).tolist())


# pairs of samples -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactPair:
    """The kernel of two samples by the reference: their block, and √(K_rr K_cc) of its entries."""

    values: FloatArray  # (planes, outputs, outputs)
    scale: FloatArray  # (planes, outputs, outputs)


def mapped_kernel(
    kernel: FloatArray,  # (n₁ logits, n₂ logits)
    chosen: OutputMap,
    num_logits: int,
) -> FloatArray:  # (planes, n₁ outputs, n₂ outputs)
    """Turn the kernel of all logits, as the reference has it, into what a store of an output map holds."""
    n1, n2 = (length // num_logits for length in kernel.shape)
    blocks = kernel.reshape(n1, num_logits, n2, num_logits)
    if chosen.reduction == "trace":
        return np.asarray(np.einsum("iaja->ij", blocks))[None]
    if chosen.reduction == "diagonal":
        return np.asarray(np.einsum("iaja->aij", blocks))
    if chosen.matrix is None:
        return kernel[None]
    A = chosen.matrix.numpy()
    return np.asarray(np.einsum("oa,iajb,pb->iojp", A, blocks, A).reshape(1, n1 * len(A), n2 * len(A)))


def exact_pair(model: nn.Module, inputs: Inputs, pair: tuple[int, int], chosen: OutputMap) -> ExactPair:
    """Recompute the kernel of a sample of the rows and one of the columns with the reference."""
    columns = inputs.x if inputs.against is None else inputs.against
    full = reference_ntk(model, torch.stack([inputs.x[pair[0]], columns[pair[1]]])).numpy()
    kernel = mapped_kernel(full, chosen, len(full) // 2)
    m = kernel.shape[1] // 2
    diagonal = np.diagonal(kernel, axis1=1, axis2=2)
    return ExactPair(kernel[:, :m, m:], np.sqrt(diagonal[:, :m, None] * diagonal[:, None, m:]))


def max_pair_errors(
    store: KernelStore,
    pairs: list[tuple[int, int]],
    exact: Callable[[int, int], ExactPair],
    report: Report = ignore_report,
) -> dict[str, float]:
    """Find the largest |K̃_rc − K_rc| / √(K_rr K_cc) of some pairs of samples, for each store dtype."""
    kernels = {dtype: kernels_of(store, dtype) for dtype in store.manifest.dtypes}
    largest = dict.fromkeys(kernels, 0.0)
    for done, (i, j) in enumerate(pairs, start=1):
        expected = exact(i, j)
        rows, cols = (Block(index, index + 1).rows(store.grid.num_outputs) for index in (i, j))
        scale = np.where(expected.scale > 0, expected.scale, 1.0)  # beside zeros the error is absolute
        for dtype, planes in kernels.items():
            values = np.stack([kernel[rows, cols] for kernel in planes]).astype(np.float64)
            errors = np.abs(values - expected.values) / scale
            largest[dtype] = max(largest[dtype], float(errors.max()))
        report("pairs", done, len(pairs))
    return largest
