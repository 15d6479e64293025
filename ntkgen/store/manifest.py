"""The manifest of a store: what its kernel is, and what a resumed run must match."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import ntkgen
from ntkgen.errors import FingerprintError
from ntkgen.plan.plan import Plan
from ntkgen.store.certificate import Certificate
from ntkgen.store.provenance import Provenance
from ntkgen.store.rounding import STORE_DTYPES

FORMAT_VERSION = 3
# Maximum size of a kernel, in bytes over all dtypes and layers, that the layout `auto` writes in full. A larger one is
# written as one triangle.
FULL_LAYOUT_BYTES = 10 * 10**9
# Key of the imported file's name, in the identity and the provenance of a store that was imported.
IMPORTED = "imported_from"


def resolve_layout(layout: str, num_rows: int, dtypes: tuple[str, ...], num_groups: int = 0) -> str:
    """Replace `auto` by `full` or `upper`. The kernels of groups of parameters have the most precise dtype.

    >>> resolve_layout("auto", 5000, ("float16", "float32")), resolve_layout("auto", 500_000, ("float16",))
    ('full', 'upper')
    """
    if layout != "auto":
        return layout
    sizes = [np.dtype(dtype).itemsize for dtype in dtypes]
    bytes_in_full = num_rows**2 * (sum(sizes) + num_groups * max(sizes))
    return "full" if bytes_in_full <= FULL_LAYOUT_BYTES else "upper"


@dataclass(frozen=True)
class Manifest:
    """The description that a store holds. A resumed run must match ``identity``. ``provenance`` is only informative."""

    identity: Mapping[str, Any]
    provenance: Provenance
    plan: Plan
    dtypes: tuple[str, ...]
    layout: str
    is_complete: bool = False
    replanned: int = 0
    certificate: Certificate | None = None  # measured error of the finished kernel, with an upper bound

    @property
    def fingerprint(self) -> str:
        """Hash of the identity: parameters, samples and settings of the kernel."""
        return hashlib.sha256(json.dumps(dict(self.identity), sort_keys=True).encode()).hexdigest()

    @property
    def is_imported(self) -> bool:
        """Whether the kernel was imported from a file, and not computed."""
        return IMPORTED in self.identity

    @property
    def num_logits(self) -> int:
        """Number of network outputs per sample. It is 0 for an imported kernel, which has no logits."""
        return self.plan.profile.num_logits

    @property
    def output(self) -> str:
        """Name of the output map. It is `full` for an imported kernel."""
        return str(self.identity.get("output", "full"))

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of the parameters of each group that has a kernel of its own, by the name of the group."""
        return {group["name"]: tuple(group["parameters"]) for group in self.identity.get("layers", ())}

    @property
    def layer_dtype(self) -> str:
        """Dtype in which the kernels of groups are stored, which is the most precise one."""
        return max(self.dtypes, key=STORE_DTYPES.index)

    @property
    def quantity(self) -> str:
        """Meaning of the kernel's true values."""
        return "J Jᵀ" if self.provenance.quantity is None else str(self.provenance.quantity)

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for the attribute of the group."""
        return {
            "format_version": FORMAT_VERSION,
            "version": ntkgen.__version__,
            "status": "complete" if self.is_complete else "in_progress",
            "fingerprint": self.fingerprint,
            "num_samples": self.plan.grid.num_samples,
            "num_outputs": self.plan.grid.num_outputs,
            "num_params": self.plan.profile.num_params,
            "row_order": "sample-major",
            "layout": self.layout,
            "dtypes": list(self.dtypes),
            "identity": dict(self.identity),
            "provenance": self.provenance.to_json(),
            "plan": self.plan.to_json(),
            "replanned": self.replanned,
            "certificate": None if self.certificate is None else self.certificate.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        """Read the values that `to_json` wrote.

        Raises:
            ValueError: If the values contradict each other.
        """
        plan, certificate = Plan.from_json(values["plan"]), values["certificate"]
        manifest = cls(
            identity=values["identity"],
            provenance=Provenance.of(values["provenance"]),
            plan=plan,
            dtypes=tuple(values["dtypes"]),
            layout=values["layout"],
            is_complete=values["status"] == "complete",
            replanned=values["replanned"],
            certificate=None if certificate is None else Certificate.from_json(certificate, plan.precision),
        )
        if manifest.fingerprint != values["fingerprint"]:
            raise ValueError("the manifest does not match its own fingerprint")
        if set(manifest.dtypes) - set(STORE_DTYPES) or not manifest.dtypes:
            raise ValueError("the manifest has an unknown dtype, or none")
        if manifest.layout not in {"upper", "full"}:
            raise ValueError("the manifest has an unknown layout")
        if list(manifest.dtypes) != list(manifest.identity.get("dtypes", manifest.dtypes)):
            raise ValueError("the dtypes of the manifest differ from those of its identity")
        if len(manifest.layers) != plan.grid.num_groups:
            raise ValueError("the manifest has another number of layers than its plan")
        return manifest


def check_identity(path: str, manifest: Manifest, identity: Mapping[str, Any]) -> None:
    """Refuse to continue a store that holds another kernel.

    Raises:
        FingerprintError: If parameters, samples or settings differ. The message names the differences.
    """
    stored = manifest.identity
    names = [name for name in {**stored, **identity} if stored.get(name) != identity.get(name)]
    if names:
        differing = ", ".join(_difference(name, stored.get(name), identity.get(name)) for name in names)
        raise FingerprintError(
            f"The store at {path} holds another kernel: expected the same network, samples and settings, found "
            f"differences ({differing}). Tiles of two kernels would be mixed. Was the store made with other settings? "
            "Use another path, or the original settings, or remove the store."
        )


def _difference(name: str, stored: Any, now: Any) -> str:
    """Describe two different values.

    >>> groups = [{"name": "head", "parameters": ["a"]}], [{"name": "head", "parameters": ["b"]}]
    >>> _difference("layers", *groups), _difference("layers", groups[0], None)
    ('layers head, now head of other parameters', 'layers head, now None')
    """
    if name == "layers":
        stored, now = (value and [group["name"] or "''" for group in value] for value in (stored, now))
        return f"layers {_short(stored)}, now {_short(now)}{' of other parameters' * (stored == now)}"
    return f"{name} {_short(stored)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 24 else text[:8] + "…"
