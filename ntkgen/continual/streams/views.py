"""The two views under which the network at a boundary between tasks is looked at: the next task, and the previous ones.

Boundary k is where k tasks are finished: boundary 0 is before any training, and the last one after the last task.
"""

import numpy as np

from ntkgen.continual.chance import generator_of
from ntkgen.continual.streams.tasks import IntArray, Stream

NEXT, PREVIOUS = "next_task", "previous_tasks"
VIEWS = (NEXT, PREVIOUS)


def classes_of(view: str, stream: Stream, boundary: int) -> tuple[int, ...]:
    """List the classes of a view at a boundary.

    There are none of the next task at the last boundary, and none of previous tasks at the first. If the next task has
    all earlier classes too, as in a stream of cumulative classes, its new ones are meant.
    """
    seen = stream.order[: stream.num_seen(boundary - 1)] if boundary else ()
    if view == PREVIOUS:
        return seen
    if boundary == len(stream):
        return ()
    classes = stream.tasks[boundary].classes
    fresh = tuple(label for label in classes if label not in seen)
    return fresh if fresh and set(seen) <= set(classes) else classes


def samples_of(
    view: str,
    stream: Stream,
    labels: IntArray,  # (train samples,)
    boundary: int,
    limit: int,
    seed: int,
) -> IntArray:  # (at most limit,)
    """Draw samples of the classes of a view from the split ``train``, whether a task trains or validates on them.

    Args:
        view: One of `VIEWS`.
        stream: The tasks.
        labels: Labels of the split.
        boundary: The number of finished tasks.
        limit: Maximum number of samples.
        seed: The seed of the run.
    """
    members = np.flatnonzero(np.isin(labels, classes_of(view, stream, boundary)))
    rng = generator_of(seed, "probe", boundary, VIEWS.index(view))
    return np.sort(rng.permutation(members)[:limit])
