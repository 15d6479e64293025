"""What a store says of itself, and what a resumed run must agree with."""

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
# Written in full while all dtypes together take at most this much; above, one triangle.
FULL_LAYOUT_BYTES = 10 * 10**9
# In the identity of a store that was not computed, and in its provenance: the file that it was made of.
IMPORTED = "imported_from"


def resolve_layout(layout: str, num_rows: int, dtypes: tuple[str, ...]) -> str:
    """Turn `auto` into `full` or `upper`.

    >>> resolve_layout("auto", 5000, ("float16", "float32")), resolve_layout("auto", 500_000, ("float16",))
    ('full', 'upper')
    """
    if layout != "auto":
        return layout
    bytes_in_full = num_rows**2 * sum(np.dtype(dtype).itemsize for dtype in dtypes)
    return "full" if bytes_in_full <= FULL_LAYOUT_BYTES else "upper"


@dataclass(frozen=True)
class Manifest:
    """What a store says of itself. A resumed run must agree with ``identity``; ``provenance`` is to be read alone."""

    identity: Mapping[str, Any]
    provenance: Provenance
    plan: Plan
    dtypes: tuple[str, ...]
    layout: str
    is_complete: bool = False
    replanned: int = 0
    certificate: Certificate | None = None  # how accurate the finished kernel was found to be

    @property
    def fingerprint(self) -> str:
        """Hash what the kernel is of and how it is computed."""
        return hashlib.sha256(json.dumps(dict(self.identity), sort_keys=True).encode()).hexdigest()

    @property
    def is_imported(self) -> bool:
        """Whether the kernel was made of a file, and not computed."""
        return IMPORTED in self.identity

    @property
    def num_logits(self) -> int:
        """Count what the network returns of a sample; none where the kernel was imported, and has no logits."""
        return self.plan.profile.num_logits

    @property
    def output(self) -> str:
        """The output map; an imported kernel has all outputs."""
        return str(self.identity.get("output", "full"))

    @property
    def quantity(self) -> str:
        """What the kernel's true values are."""
        return "J Jᵀ" if self.provenance.quantity is None else str(self.provenance.quantity)

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values for the group's attribute."""
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
        """Read back what `to_json` wrote.

        Raises:
            ValueError: If it is not what that writes.
        """
        plan, certificate = Plan.from_json(values["plan"]), values["certificate"]
        made = cls(
            identity=values["identity"],
            provenance=Provenance.of(values["provenance"]),
            plan=plan,
            dtypes=tuple(values["dtypes"]),
            layout=values["layout"],
            is_complete=values["status"] == "complete",
            replanned=values["replanned"],
            certificate=None if certificate is None else Certificate.from_json(certificate, plan.precision),
        )
        if made.fingerprint != values["fingerprint"] or set(made.dtypes) - set(STORE_DTYPES) or not made.dtypes:
            raise ValueError("the manifest does not agree with its own fingerprint")
        if made.layout not in {"upper", "full"}:
            raise ValueError("the manifest has a layout that none can have")
        if list(made.dtypes) != list(made.identity.get("dtypes", made.dtypes)):
            raise ValueError("the manifest names other dtypes than its identity")
        return made


def check_identity(path: str, manifest: Manifest, identity: Mapping[str, Any]) -> None:
    """Refuse to continue a store that was made of something else.

    Raises:
        FingerprintError: If parameters, samples or settings differ; the message names what does.
    """
    theirs = manifest.identity
    names = [name for name in {**theirs, **identity} if theirs.get(name) != identity.get(name)]
    if names:
        differing = ", ".join(f"{name} {_short(theirs.get(name))}, now {_short(identity.get(name))}" for name in names)
        raise FingerprintError(
            f"The store at {path} was made from something else ({differing}). Tiles of two kernels would be "
            "mixed. Use another path, or the original settings, or remove the store."
        )


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 24 else text[:8] + "…"
