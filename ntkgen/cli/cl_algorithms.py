"""`ntkgen cl-plot --algorithms`: pictures that compare algorithms over the tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkgen.errors import InputError

if TYPE_CHECKING:
    from ntkgen.analysis.plots.style import Picture
    from ntkgen.files.folder import Folder


def pictures_of_algorithms(
    place: str, *, algorithms: str | None, metrics: Sequence[str], baseline: str | None
) -> "tuple[list[Picture], dict[str, str]]":
    """Draw the results in a folder with one folder per algorithm.

    Args:
        place: The folder.
        algorithms: Names of the algorithms, separated by commas; None for all.
        metrics: Names of the metrics; none for all.
        baseline: The algorithm that relative accuracies are relative to; None for `BASELINE`, if it is there.

    Returns:
        The pictures, and the reason for each that is left out.

    Raises:
        InputError: If no algorithm is named.
    """
    from ntkgen.continual.algorithms import BASELINE, list_algorithms, read_results
    from ntkgen.continual.plots.plasticity import draw_algorithms
    from ntkgen.files.place import folder_of

    folder: Folder = folder_of(place)
    known = list_algorithms(folder)
    names = known if algorithms is None else [name.strip() for name in algorithms.split(",") if name.strip()]
    if not names:
        raise InputError(
            "`algorithms` names none: expected names of folders, separated by commas, found no name. Is a variable of "
            "the shell not set? Leave the option out for all algorithms."
        )
    results = {name: read_results(folder, name) for name in dict.fromkeys(names)}
    relative_to: Any = None
    if baseline is not None or BASELINE in known:
        name = baseline or BASELINE
        relative_to = results.get(name) or read_results(folder, name)
    return draw_algorithms(list(results.values()), metrics, relative_to)


def stem_of(place: str) -> str:
    """Name the pictures after their folder.

    >>> stem_of("runs/cifar/")
    'cifar'
    """
    return Path(place).absolute().name
