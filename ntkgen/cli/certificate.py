"""Printed text of a certificate, which is a measured bound on the error of a stored kernel."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntkgen.store.certificate import Certificate, StoredError
    from ntkgen.store.describe import StoreDescription


def certificate_lines(found: "StoreDescription") -> dict[str, str]:
    """Write the certificate of a store: one line for each dtype, and the meaning of the numbers."""
    certificate = found.certificate
    if certificate is None:
        if found.provenance.model is None:
            return {"certificate": "none: the store does not name its network"}
        return {"certificate": "none yet; the same `ntkgen compute` or `ntkgen verify --certify` makes one"}
    what = f"{'size' if certificate.is_exact else 'bound on the size'} of the error E = stored − exact kernel"
    return {
        "certificate": f"{what}, from {_compared(certificate, found.num_logits)}{_compared_in(certificate)}",
        **{error.dtype: _error_line(error, is_exact=certificate.is_exact) for error in certificate.errors},
        "": f"{_no_value(found)} has an error above {'' if certificate.is_exact else 'the bound on '}‖E‖_F",
        **({} if found.inaccuracy is None else {"WRONG": found.inaccuracy}),
    }


def _compared(certificate: "Certificate", num_logits: int) -> str:
    if certificate.is_exact:
        return "the comparison of every entry"
    count, pairs = certificate.num_pair_outputs, f"{certificate.num_pairs} pairs of samples"
    some = "" if count in {None, num_logits} else f" ({count} outputs of each)"
    return f"{certificate.num_probes} random vectors and {pairs}{some}, seed {certificate.seed}"


def _compared_in(certificate: "Certificate") -> str:
    dtype = certificate.exact_dtype
    return "" if dtype == "float64" else f"; the exact kernel is in {dtype}, because the network cannot run in float64"


def _error_line(error: "StoredError", *, is_exact: bool) -> str:
    norm = f"= {error.bound:.3g}" if is_exact else f"≤ {error.bound:.3g} with 95 % confidence"
    suffix = f"; SUSPICIOUS blocks of rows: {', '.join(map(str, error.suspicious))}" if error.suspicious else ""
    return (
        f"‖E‖_F {norm}, {error.relative_bound:.2g} of ‖K‖_F ({error.allowed:.2g} allowed); largest error of "
        f"{'an' if is_exact else 'a sampled'} entry {error.max_pair_error:.2g} of √(K_rr K_cc)"
        f"{suffix}"
    )


def _no_value(found: "StoreDescription") -> str:
    value = "eigenvalue" if found.num_col_samples is None else "singular value"
    return f"no {value}{' of a matrix' if found.output == 'diagonal' else ''}"


def certificate_summary(found: "StoreDescription") -> str:
    """Write the errors of all dtypes, or the bounds on them, in one line."""
    if found.certificate is None:
        return "not certified"
    if found.inaccuracy is not None:
        return f"WRONG. {found.inaccuracy}"
    bounds = ", ".join(
        f"{error.bound:.3g} in {error.dtype} ({error.relative_bound:.2g} of ‖K‖_F)"
        for error in found.certificate.errors
    )
    how = "from the comparison of every entry" if found.certificate.is_exact else "with 95 % confidence"
    return f"{_no_value(found)} has an error above {bounds}, {how}"
