"""The identity of a kernel, and the check that a network is the one that a store was made from."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.blocks import Block
from ntkgen.engine.machine import environment
from ntkgen.errors import FingerprintError, StoreError
from ntkgen.fingerprints import parameter_fingerprint
from ntkgen.inputs import Inputs
from ntkgen.jacobian.adapter import Adapter
from ntkgen.jacobian.compute import compute_factors, pad_batch
from ntkgen.jacobian.contract import exact_diagonal, reduced_diagonal
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.groups import ParameterGroup
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.outputs import prepare_mapped
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.plan.plan import Plan
from ntkgen.plan.spec import KernelSpec
from ntkgen.plan.tiles import TileGrid
from ntkgen.store.schema import side_arrays
from ntkgen.store.store import KernelStore

# Maximum difference between recomputed and stored outputs of the same network, relative to the largest output: in the
# same batch, in other batches, and on another machine, which adds numbers in another order.
SAME_BATCH = {torch.float64: 1e-12, torch.float32: 1e-6}
OTHER_BATCH = {torch.float64: 1e-10, torch.float32: 1e-4}
OTHER_MACHINE = {torch.float64: 1e-9, torch.float32: 1e-3}
# Number of samples, spread evenly over the store, that are run again before a store is continued or returned.
SPREAD_SAMPLES = 256
# Number of samples whose diagonal is computed if the network does not have the layers of the store's plan.
ALONE_SAMPLES = 8


def identity_of(
    model: nn.Module, inputs: Inputs, spec: KernelSpec, grid: TileGrid, groups: Sequence[ParameterGroup] = ()
) -> dict[str, Any]:
    """Collect the properties that must be equal when a store is continued.

    A function of the user is known by its qualified name. Outputs and gradients are compared besides, by
    `require_same_network`.
    """
    asked = model.described() if isinstance(model, Adapter) else {}
    if groups:
        asked["layers"] = [{"name": group.name, "parameters": list(group.params)} for group in groups]
    return asked | {
        "parameters": parameter_fingerprint(model),
        "samples": inputs.fingerprint(),
        "output": spec.output,
        "precision": spec.precision,
        "tile_side": grid.side,
        "dtypes": list(spec.dtypes),
    }


def network_of(store: KernelStore, model: nn.Module, inputs: Inputs, device: torch.device) -> Network:
    """Prepare the network of a store on a device, according to the plan and the manifest of the store."""
    plan, output = store.manifest.plan, store.manifest.output
    network, _ = prepare_mapped(
        model.to(device), inputs.probe, plan.precision, output, device=device, excluded=plan.profile.fallback
    )
    return network


def require_same_network(store: KernelStore, network: Network, inputs: Inputs) -> None:
    """Require that a network gives the stored outputs and gradients, before its store is continued or returned.

    Networks with equal parameters can differ, for example in an activation or an epsilon. Therefore samples spread over
    the store are run again, and the diagonal of one batch is computed again.

    Raises:
        FingerprintError: If an output or an entry of the diagonal differs.
    """
    known = KnownOutputs(store, network)
    if known.logits is None:
        return
    stored = known.logits.isfinite().all(1).nonzero().squeeze(1)
    if not len(stored):
        return
    plan = store.manifest.plan
    batch_size, x = plan.jacobian.batch_size, inputs.all
    first = _first_batch(plan, int(stored[0]))
    spread = stored[torch.linspace(0, len(stored) - 1, min(len(stored), SPREAD_SAMPLES)).long()]
    with exact_arithmetic(network.device, plan.environment.threads), torch.no_grad():
        for chosen, tolerances in ((torch.arange(first.start, first.stop), SAME_BATCH), (spread, OTHER_BATCH)):
            for indices in chosen.split(batch_size):
                samples = network.input(x[indices])
                logits = outputs_of(network.module, pad_batch(samples, batch_size))[: len(samples)]
                known.require(indices, logits, tolerances)
    _require_same_diagonal(store, network, known, x, first)


class KnownOutputs:
    """The stored outputs of a network. Outputs of another network are refused.

    Every block that is computed again for a store is compared with the stored outputs. Thus a continued store has no
    tile of another network, even if the two networks differ for a few samples only.
    """

    def __init__(self, store: KernelStore, network: Network) -> None:
        self._name = store.name
        found = environment(network.device, store.manifest.plan.environment.threads)
        self._is_same_machine = not store.manifest.plan.environment.differences(found)
        self._dtype = network.precision.compute_dtype
        self.logits = _stored_logits(store)

    def require(self, indices: Tensor, logits: Tensor, tolerances: dict[torch.dtype, float]) -> None:
        """Compare the outputs for some samples with the stored ones. Outputs that are not stored yet are not compared.

        Raises:
            FingerprintError: If they differ by more than rounding explains.
        """
        if self.logits is None:
            return
        expected = self.logits[indices]
        is_known = expected.isfinite().all(1)
        expected, found = expected[is_known], logits.detach().cpu().double()[is_known]
        if not len(expected):
            return
        self.refuse_difference("outputs", found, expected, tolerances)

    def refuse_difference(
        self, what: str, found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]
    ) -> None:
        """Compare numbers of the network with the stored ones, relative to the largest.

        Raises:
            FingerprintError: If they differ by more than rounding explains.
        """
        tolerance = (tolerances if self._is_same_machine else OTHER_MACHINE)[self._dtype]
        difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= tolerance * max(scale, 1e-30):
            raise FingerprintError(_another_network(self._name, what, difference, scale))


def _another_network(name: str, what: str, difference: float, scale: float) -> str:
    return (
        f"The store at {name} was made from another network with the same parameters: expected the stored {what} for "
        f"some samples, found a difference of {difference:.1e} (the largest is {scale:.1e}). Was an activation, an "
        "epsilon or the code of the network changed? Use a new path for this network, or the original network for this "
        "store."
    )


def _stored_logits(store: KernelStore) -> Tensor | None:  # (samples of rows, then of columns; logits), NaN if missing
    """Read the logits of a store. Return None if there are none, or if they are damaged."""
    missing = set(store.missing_blocks())
    plan = store.manifest.plan
    if not store.num_logits or len(missing) == plan.grid.num_sides:
        return None
    try:
        logits = torch.cat([torch.from_numpy(store.read(names[1])) for names in side_arrays(store.grid)])
    except StoreError:  # a damaged array is computed again later
        return None
    for index in missing:
        for block in plan.side_blocks(index):
            logits[block.start : block.stop] = torch.nan
    return logits


def _first_batch(plan: Plan, sample: int) -> Block:
    """Find the batch that starts with the given sample, which is the first of its block."""
    for index in range(plan.grid.num_sides):
        for block in plan.side_blocks(index):
            if block.start == sample:
                return next(iter(block.pieces(plan.jacobian.batch_size)))
    return Block(sample, sample + 1)


def _require_same_diagonal(store: KernelStore, network: Network, known: KnownOutputs, x: Tensor, batch: Block) -> None:
    """Compare the diagonal of one batch with the stored one. Networks with equal outputs can differ in their gradients.

    Raises:
        FingerprintError: If the diagonal differs.
    """
    plan, grid = store.manifest.plan, store.grid
    if not network.follows(plan.profile):  # other code, or another machine, whose trial disproves other rules
        batch = Block(batch.start, min(batch.stop, batch.start + ALONE_SAMPLES))
    is_column = batch.start >= grid.num_samples
    first = grid.num_samples if is_column else 0
    m = grid.num_outputs
    rows = slice((batch.start - first) * m, (batch.stop - first) * m)
    with suppress(StoreError):  # a damaged array is computed again later
        expected = torch.from_numpy(store.read(side_arrays(grid)[int(is_column)][0])[..., rows])
        with exact_arithmetic(network.device, plan.environment.threads):
            diagonal = _diagonal(network, plan, x[batch.start : batch.stop]).cpu()
            found = reduced_diagonal(diagonal, plan.jacobian.reduction)
        known.refuse_difference("gradients", found, expected, OTHER_BATCH)


def _diagonal(
    network: Network,
    plan: Plan,
    x: Tensor,  # (samples, …)
) -> Tensor:  # (samples, outputs), float64
    """Compute the diagonal of the kernel: from the factors of the plan, or without a plan if the network has others."""
    if network.follows(plan.profile):
        return exact_diagonal(compute_factors(network, plan.jacobian, x))
    return torch.stack([_diagonal_alone(network, sample) for sample in network.input(x)])


def _diagonal_alone(
    network: Network,
    sample: Tensor,
) -> Tensor:  # (outputs,), float64
    """Compute K[o, o] = Σ_p |∂f_o/∂p|² of one sample, with one backward pass per output."""
    params = [param for param in network.params.values() if param.requires_grad]
    outputs = network.mapped(outputs_of(network.module, sample[None]))[0]
    diagonal = torch.zeros(len(outputs), dtype=torch.float64, device="cpu")
    for index, output in enumerate(outputs if outputs.requires_grad else ()):
        grads = torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
        diagonal[index] = sum(float(grad.to_dense().abs().square().sum()) for grad in grads if grad is not None)
    return diagonal
