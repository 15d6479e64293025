"""The network of a recorded run at each boundary between tasks, from its stored parameters."""

import io

import torch
from torch import nn

from ntkgen.continual.network import build_network
from ntkgen.continual.plan import Data, Plan
from ntkgen.continual.reading import RunReader
from ntkgen.errors import FingerprintError, StoreError


def plan_of(run: RunReader, data: Data) -> Plan:
    """Divide the data of a recorded run into its tasks.

    Raises:
        FingerprintError: If these are other data.
        StoreError: If the run was imported.
    """
    stored = run.config["facts"].get("data")
    if stored is None:
        raise StoreError(
            f"The run at {run.folder} has no stored parameters: expected those at the end of each task, found a run "
            "that was imported with its numbers alone. Was another folder meant? Name a run of `ntkgen cl-run`."
        )
    plan = Plan.of(run.settings, data)
    if stored != plan.facts["data"]:
        raise FingerprintError(
            f"The run at {run.folder} was made from other data: expected the fingerprint {str(stored)[:16]}, found "
            f"{plan.facts['data'][:16]}. Are the files of {run.settings.dataset} another version, or normalised in "
            "another way? Pass the data that `load_data` gives for the settings of the run."
        )
    return plan


def network_at(run: RunReader, plan: Plan, boundary: int) -> nn.Module:
    """Build the network as it was after some number of finished tasks.

    Runs of earlier versions have no initial parameters. They are drawn again from the seed of the run, and are the same
    if torch draws the same random numbers.

    Args:
        run: The run.
        plan: Its plan.
        boundary: The number of finished tasks. 0 means the initial network.

    Raises:
        StoreError: If the parameters are missing or damaged.
    """
    model = build_network(run.settings, plan.num_outputs(max(boundary - 1, 0)))
    key = f"models/task{boundary - 1}.pt" if boundary else "models/start.pt"
    data = run.folder.read(key)
    if data is None:
        if not boundary:  # a run of an earlier version
            return model
        raise StoreError(
            f"The run at {run.folder} has no parameters at the end of task {boundary - 1}: expected {key}, found none. "
            "Is it still at work? Wait, or run the same `ntkgen cl-run` again."
        )
    try:
        model.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged file makes of it
        raise StoreError(
            f"The parameters of the run at {run.folder} cannot be read ({type(error).__name__}): expected {key} as "
            "ntkgen writes it, for the network of the settings. A disk error, or another version of the network? "
            "Remove the folder, and run the same command again."
        ) from error
    return model
