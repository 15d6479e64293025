"""Output maps: what is differentiated, and what is kept of each pair's block."""

import pytest
import torch
from cases import CASES, reference_of, relative_error

from ntkgen.errors import InputError, UnknownNameError
from ntkgen.jacobian.dense import ntk
from ntkgen.jacobian.outputs import contrast_matrix, output_map, prepare_mapped

NAMES = ["full", "sum", "centered", "index:0", "trace", "diagonal"]
# a convolution with batch norm, a fallback, a network with tied weights
NETWORKS = ["residual_with_shortcut", "lstm", "transformer", "tied_weights"]


def expected(name, output):
    kernel = reference_of(name)
    m = len(kernel) // len(CASES[name]().x)
    blocks = kernel.view(len(kernel) // m, m, -1, m)
    chosen = output_map(output, m)
    if chosen.reduction == "trace":
        return torch.einsum("ioja,oa->ij", blocks, torch.eye(m, dtype=torch.float64))
    if chosen.reduction == "diagonal":
        return torch.stack([blocks[:, o, :, o] for o in range(m)])
    matrix = torch.eye(m, dtype=torch.float64) if chosen.matrix is None else chosen.matrix
    return torch.einsum("ao,iojp,bp->iajb", matrix, blocks, matrix).reshape(len(blocks) * len(matrix), -1)


@pytest.mark.parametrize("output", NAMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_kernel_of_mapped_outputs_is_the_mapped_kernel(name, output):
    case = CASES[name]()
    assert relative_error(ntk(case.module, case.x, output=output, precision="float64"), expected(name, output)) < 1e-10


def test_reductions_of_the_blocks_of_a_pair_of_samples_are_consistent():
    case = CASES["residual_with_shortcut"]()
    n = len(case.x)
    full, trace, total, centered = (
        ntk(case.module, case.x, output=output, precision="float64") for output in ("full", "trace", "sum", "centered")
    )
    m = len(full) // n
    blocks = full.reshape(n, m, n, m)
    assert relative_error(trace, torch.einsum("iaja->ij", blocks)) < 1e-12
    assert relative_error(total, blocks.sum((1, 3))) < 1e-12
    contrasts = centered.reshape(n, m - 1, n, m - 1)
    assert relative_error(torch.einsum("iaja->ij", contrasts), trace - total / m) < 1e-12


@pytest.mark.parametrize("output", NAMES)
def test_rectangular_kernels_are_the_blocks_of_the_square_one(output):
    case = CASES["residual_with_shortcut"]()
    whole = ntk(case.module, case.x, output=output, precision="float64")
    left, right = case.x[:1], case.x[1:]
    part = ntk(case.module, left, right, output=output, precision="float64")
    rows = part.shape[-2]
    assert relative_error(part, whole[..., :rows, rows:]) < 1e-10


def test_contrasts_are_orthonormal_and_remove_the_common_shift():
    matrix = contrast_matrix(7)
    assert torch.allclose(matrix @ matrix.T, torch.eye(6, dtype=torch.float64))
    assert torch.allclose(matrix.T @ matrix, torch.eye(7, dtype=torch.float64) - torch.full((7, 7), 1 / 7).double())


def test_the_centered_kernel_has_the_nonzero_spectrum_of_centered_logits():
    kernel, case = reference_of("residual_with_shortcut"), CASES["residual_with_shortcut"]()
    m = len(kernel) // len(case.x)
    centering = torch.block_diag(*[torch.eye(m).double() - 1 / m] * len(case.x))
    spectrum = torch.linalg.eigvalsh(centering @ kernel @ centering)
    found = torch.linalg.eigvalsh(ntk(case.module, case.x, output="centered", precision="float64"))
    assert torch.allclose(found, spectrum[-len(found) :], rtol=1e-9, atol=1e-12 * float(spectrum[-1]))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (3, UnknownNameError, "full"),
        ("mean", UnknownNameError, "full"),
        ("index:", UnknownNameError, "index:K"),
        ("index:-1", InputError, "0 to 2.*from the end"),
        ("index:-0", UnknownNameError, "index:K"),
        ("index:3", InputError, "0 to 2"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(name, error, message):
    with pytest.raises(error, match=message) as refused:
        output_map(name, 3)
    assert "\n" not in str(refused.value)


def test_nothing_is_left_of_a_single_centered_logit():
    with pytest.raises(InputError, match="at least two"):
        output_map("centered", 1)


@pytest.mark.parametrize("output", NAMES)
def test_a_network_is_prepared_for_the_outputs_of_its_map(output):
    case = CASES["residual_with_shortcut"]()
    excluded = [next(name for name, _ in case.module.named_parameters())]
    network, chosen = prepare_mapped(case.module, case.x, "float64", output, excluded=excluded)
    m = network.profile.num_logits
    assert (chosen.name, network.precision.compute_dtype) == (output, torch.float64)
    assert set(excluded) <= set(network.fallback)
    logits = torch.arange(float(m), dtype=torch.float64)
    mapped = network.mapped(logits)
    assert len(mapped) == network.profile.num_outputs
    assert torch.equal(mapped, logits if chosen.matrix is None else chosen.matrix @ logits)
