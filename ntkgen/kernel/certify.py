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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ntkgen.checkpoint import parameter_fingerprint
from ntkgen.errors import FingerprintError, ModelError, ShapeError, StoreError
from ntkgen.jacobian.operator import NTKOperator
from ntkgen.jacobian.outputs import OutputMap, output_map
from ntkgen.kernel.arrays import side_arrays
from ntkgen.kernel.certificate import (
    BLOCK_RATIO,
    HALF_SUBNORMAL,
    POLICY_ROUNDOFF,
    UNIT_ROUNDOFF,
    USUAL_SAMPLING,
    Certificate,
    Sampling,
    StoredError,
    allowed_error,
    upper_bound,
    usual_sampling,
)
from ntkgen.kernel.inputs import Inputs
from ntkgen.kernel.pairs import Pairs, ReferenceRows, kernels_of, max_pair_errors
from ntkgen.kernel.store import KernelStore
from ntkgen.kernel.tiles import TileGrid

# A block of samples is suspicious whose error is so many times what rounding explains.
SUSPICIOUS_RATIO = 10.0
# A kernel J₁ J₂ᵀ below so many times ‖J₁‖_F ‖J₂‖_F is judged as if it were so large.
SMALL_PRODUCT = 1e-3
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
    chosen = output_map(store.manifest.identity.get("output", "full"), store.manifest.plan.profile.num_logits)
    exact = exact_operator(model, inputs.x, inputs.against, chosen.matrix)
    _check_size(store, chosen, exact, inputs)
    V = draw_probes(grid.num_cols, sampling)
    step = counted(report, "stored product", len(dtypes) * grid.num_planes * len(_places(store)))
    stored = {dtype: stored_product(store, dtype, V, step) for dtype in dtypes}
    KV = exact_product(exact, chosen, V, report)
    pairs = Pairs.draw(store, chosen, exact.num_outputs, sampling)
    pair_errors = max_pair_errors(store, pairs, ReferenceRows.of(model, inputs, chosen, exact), report)
    errors = tuple(_stored_error(store, dtype, stored[dtype] - KV, KV, pair_errors[dtype]) for dtype in dtypes)
    return Certificate(
        sampling.num_probes,
        len(pairs.places),
        sampling.seed,
        _norm(KV),
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
    sampling = sampling or usual_sampling(store.manifest.identity.get("output", "full"), num_logits)
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


def sample_norms(
    grid: TileGrid,
    product: FloatArray,  # (planes, rows, probes)
) -> list[FloatArray]:  # (samples,) of each block
    """Estimate ‖A_i‖_F for the rows of each sample i, block by block."""
    of_samples = product.reshape(grid.num_planes, grid.num_samples, -1)
    norms = np.linalg.norm(of_samples, axis=(0, 2)) / np.sqrt(product.shape[-1])
    return [norms[block.start : block.stop] for block in map(grid.block, range(grid.num_blocks))]


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
    suspicious, exceeding = _wrong_blocks(store, dtype, sample_norms(store.grid, EV), sample_norms(store.grid, KV))
    return StoredError(
        dtype=dtype,
        error=error,
        bound=bound,
        relative_error=error / norm,
        relative_bound=bound / norm,
        allowed=_allowed(store, dtype, _norm(KV)) / norm,
        max_pair_error=max_pair_error,
        block_errors=tuple(map(_joined, sample_norms(store.grid, EV))),
        suspicious=suspicious,
        exceeding=exceeding,
    )


def _joined(norms: FloatArray) -> float:
    return float(np.linalg.norm(norms))


def _wrong_blocks(
    store: KernelStore, dtype: str, errors: list[FloatArray], kernels: list[FloatArray]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Name the blocks whose error is out of line, and those whose error is too large, of the norms by sample.

    The size of a block is √(‖K_b‖_F ‖K‖_F): K_b = J_b Jᵀ inherits the rounding of both factors, and samples with small
    gradients that are orthogonal to the others have a K_b far below that. An error out of line counts where it is too
    large as well, or where the block's samples usually have it: a ReLU whose input is within rounding of zero changes
    one sample, and a wrong tile all of them.
    """
    precision, lost = store.manifest.plan.precision, _lost_in(store, dtype)
    sizes = np.sqrt(np.array(list(map(_joined, kernels))) * _joined(np.concatenate(kernels)))
    explained = max(UNIT_ROUNDOFF[dtype], POLICY_ROUNDOFF[precision]) * sizes + lost
    whole = np.array(list(map(_joined, errors)))
    usual = np.array([np.quantile(each, 0.5, method="lower") * np.sqrt(len(each)) for each in errors])
    exceeding = set(np.flatnonzero(whole > allowed_error(precision, dtype, ratio=BLOCK_RATIO) * sizes + lost).tolist())
    counting = exceeding | set(suspicious_blocks(usual, explained))
    return tuple(b for b in suspicious_blocks(whole, explained) if b in counting), tuple(sorted(exceeding))


def _lost_in(store: KernelStore, dtype: str) -> FloatArray:  # (blocks,)
    """Bound what the rows of each block lose in a store dtype that has no smaller numbers, in the Frobenius norm.

    That is half a subnormal number per entry: float16 has no smaller ones for samples whose kernel is far below the
    largest.
    """
    grid = store.grid
    rows = np.array([len(grid.block(index)) for index in range(grid.num_blocks)]) * grid.num_outputs
    entry = HALF_SUBNORMAL[dtype] * store.scale_factor(f"ntk_{dtype}")
    return np.asarray(entry * np.sqrt(rows * float(grid.num_cols * grid.num_planes)))


def _allowed(store: KernelStore, dtype: str, kernel_norm: float) -> float:
    """Bound the ‖E‖_F that the policy and the store dtype explain.

    A rectangular kernel may be far smaller than its factors, K = J₁ J₂ᵀ, whose rounding it inherits.
    """
    size = kernel_norm
    if not store.grid.is_symmetric:
        rows, cols = (store.read(diagonal) for diagonal, _ in side_arrays(store.grid))
        size = max(size, SMALL_PRODUCT * float(np.sqrt(np.sum(rows.sum(-1) * cols.sum(-1)))))
    explained = allowed_error(store.manifest.plan.precision, dtype) * size
    return explained + float(np.linalg.norm(_lost_in(store, dtype)))


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
