"""Passes over the tiles of a kernel, divided among the workers of a dask cluster."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ntkgen.engine.cluster import address_of, wait_for_a_worker
from ntkgen.errors import WorkerError
from ntkgen.progress import Step, ignore_step

if TYPE_CHECKING:
    from distributed import Client

Arrays = tuple[npt.NDArray[np.float64], ...]
Place = TypeVar("Place")

# Number of parts per worker thread. More parts balance the work better, but each part sends its arrays back.
PARTS_PER_THREAD = 4


def fold(
    client: "Client",
    make: Callable[..., Arrays],  # called with some of the places and with the arguments
    places: Sequence[Place],
    arguments: Sequence[Any],
    step: Step = ignore_step,  # called for each place
) -> Arrays:
    """Sum the arrays that workers compute from parts of the places, in the order of the places.

    Raises:
        WorkerError: If a part was lost repeatedly, each time with its worker.
    """
    from distributed import KilledWorker

    wait_for_a_worker(client)
    threads = sum(client.nthreads().values())
    size = max(1, -(-len(places) // (PARTS_PER_THREAD * max(1, threads))))
    parts = [places[at : at + size] for at in range(0, len(places), size)]
    sent = client.scatter(list(arguments), broadcast=True, hash=False)
    futures = [client.submit(make, part, *sent, pure=False) for part in parts]
    sums: Arrays | None = None
    try:
        for part, future in zip(parts, futures, strict=True):
            arrays: Arrays = future.result()
            future.release()
            sums = arrays if sums is None else tuple(map(np.add, sums, arrays))
            for _ in part:
                step()
    except (KilledWorker, CancelledError) as error:  # CancelledError if the arguments were lost with the worker
        raise WorkerError(
            f"A part of a pass over the tiles was lost with every worker that had begun it, at "
            f"{address_of(client)}: expected one of them to finish it. Are they killed for their memory? Each holds "
            "some tiles, and two blocks of vectors. Give them more, or leave out `client`. What is stored is as it "
            "was."
        ) from error
    finally:
        client.cancel([*futures, *sent])
    assert sums is not None, "there are no tiles"
    return sums
