"""Exact rows of the Jacobian, with which a stored kernel is compared: one backward pass of a single sample for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.inputs import Inputs
from ntkgen.jacobian.batch_check import require_finite
from ntkgen.jacobian.evaluation import as_input, evaluation_copy, outputs_of, require_matrix
from ntkgen.jacobian.failures import NotInThisDtypeError, explained_errors
from ntkgen.jacobian.operator import BATCH_SIZE, PRECISIONS, device_for, require_fitting
from ntkgen.jacobian.outputs import OutputMap
from ntkgen.jacobian.precision import exact_arithmetic, policy, without_autocast
from ntkgen.jacobian.probe import require_form, require_same_outputs
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.reference import fill_rows


@dataclass(frozen=True)
class ExactRows:
    """A copy of a network, the samples of a kernel, and the map to its outputs A f.

    Attributes:
        module: The copy, in float64, or in float32 if the network cannot be run in float64.
        sides: The samples of the rows and of the columns. A symmetric kernel has the same tensor twice.
        matrix: The output map A, in the dtype and on the device of the copy.
    """

    module: nn.Module
    sides: tuple[Tensor, Tensor]  # (n₁, …), (n₂, …)
    matrix: Tensor  # (outputs, logits)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, chosen: OutputMap) -> "ExactRows":
        """Copy a network, and run the copy on one sample.

        Raises:
            ModelError: If the network can be run neither in float64 nor in float32.
        """
        try:
            return cls.in_precision(model, inputs, chosen, "float64")
        except ModelError:
            return cls.in_precision(model, inputs, chosen, "float32")

    @classmethod
    def in_precision(cls, model: nn.Module, inputs: Inputs, chosen: OutputMap, precision: str) -> "ExactRows":
        """Copy a network in one of the `PRECISIONS`, and run the copy on one sample.

        Raises:
            NotInThisDtypeError: If the network raises an error, or returns another dtype.
            ModelError: If its outputs are no matrix.
            ShapeError: If the output map does not fit the network.
        """
        assert precision in PRECISIONS
        dtype, device = policy(precision).compute_dtype, device_for(model, precision)
        module = evaluation_copy(model, dtype, device)
        sample = as_input(inputs.x[:1], dtype, device)
        with exact_arithmetic(device), explained_errors(sample), without_autocast():
            outputs = outputs_of(module, sample)
        require_matrix(outputs, 1)
        if outputs.dtype != dtype:
            raise NotInThisDtypeError(
                f"The network returns {outputs.dtype} where its parameters are {dtype}: its forward pass rounds on its "
                "own. Is there a cast in it? Remove the cast, so that `precision` says how the kernel is computed."
            )
        matrix = torch.eye(outputs.shape[1], device="cpu") if chosen.matrix is None else chosen.matrix
        require_fitting(matrix, outputs.shape[1])
        matrix = matrix.to(device, dtype)
        return cls(module, (inputs.x, inputs.x if inputs.against is None else inputs.against), matrix)

    @property
    def params(self) -> dict[str, Tensor]:
        """The trainable parameters by name, in the order of the entries of a row."""
        return {name: param for name, param in self.module.named_parameters() if param.requires_grad}

    @property
    def distinct_sides(self) -> tuple[Tensor, ...]:
        """The samples of rows and columns, and of a symmetric kernel once."""
        return self.sides if self.sides[0] is not self.sides[1] else self.sides[:1]

    @property
    def num_logits(self) -> int:
        """Number of outputs of the network."""
        return self.matrix.shape[1]

    @property
    def dtype_name(self) -> str:
        """Name of the dtype that the network is run in."""
        return str(self.matrix.dtype).removeprefix("torch.")

    @property
    def num_params(self) -> int:
        """Number of entries of a row."""
        return count_real_numbers(self.params.values())

    def empty(self, *shape: int) -> Tensor:
        """Return memory for rows, in float64. On a device without float64 it is on the CPU."""
        device = torch.device("cpu") if self.matrix.device.type == "mps" else self.matrix.device
        return torch.empty(*shape, dtype=torch.float64, device=device)

    def fill(
        self,
        rows: Tensor,  # (outputs, params)
        sample: Tensor,
        outputs: Sequence[int],
        params: Sequence[Tensor],
    ) -> None:
        """Compute rows of some outputs of one sample, with respect to some parameters, in the given memory."""
        x = as_input(sample, self.matrix.dtype, self.matrix.device)
        with exact_arithmetic(self.matrix.device):
            fill_rows(rows, self.module, params, x, self.matrix[list(outputs)])

    def require_same_in_batches(self) -> None:
        """Refuse a network whose outputs for a sample are others in a batch than for the sample alone.

        Raises:
            DivergedError: If outputs are not finite.
            ModelError: If outputs differ by more than rounding explains, or have another form.
        """
        dtype, device = self.matrix.dtype, self.matrix.device
        with exact_arithmetic(device), torch.no_grad():
            for batch in chain.from_iterable(side.split(BATCH_SIZE) for side in self.distinct_sides):
                x = as_input(batch, dtype, device)
                outputs = outputs_of(self.module, x)
                require_form(outputs, self.num_logits, dtype)
                require_finite(outputs)
                alone = torch.cat([outputs_of(self.module, sample[None]) for sample in x])
                require_same_outputs(outputs, alone, len(x))
