"""The certificate of a store, as it is printed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntkgen.store.certificate import Certificate, StoredError
    from ntkgen.store.describe import StoreDescription


def certificate_lines(found: "StoreDescription") -> dict[str, str]:
    """Write the certificate of a described store, a line for each dtype, and what it means."""
    certificate = found.certificate
    if certificate is None:
        if found.provenance.model is None:
            return {"certificate": "none: the network is not known here"}
        return {"certificate": "none yet; the same `ntkgen compute` makes one, or `ntkgen verify --certify`"}
    sampled = _sampled(certificate, found.num_logits)
    return {
        "certificate": f"of E, stored − exact kernel, by {sampled}{_compared_in(certificate)}",
        **{error.dtype: _error_line(error) for error in certificate.errors},
        "": f"{_meaning(found)} off by more than the bound on ‖E‖_F",
        **({} if found.inaccuracy is None else {"WRONG": found.inaccuracy}),
    }


def _sampled(certificate: "Certificate", num_logits: int) -> str:
    count, pairs = certificate.num_pair_outputs, f"{certificate.num_pairs} pairs of samples"
    some = "" if count in {None, num_logits} else f" ({count} outputs of each)"
    return f"{certificate.num_probes} probes and {pairs}{some}, seed {certificate.seed}"


def _compared_in(certificate: "Certificate") -> str:
    dtype = certificate.exact_dtype
    return "" if dtype == "float64" else f"; the exact one in {dtype}, since the network cannot be run in float64"


def _error_line(error: "StoredError") -> str:
    suffix = f"; SUSPICIOUS rows of blocks {', '.join(map(str, error.suspicious))}" if error.suspicious else ""
    return (
        f"‖E‖_F ≤ {error.bound:.3g} with 95 % confidence, {error.relative_bound:.2g} of ‖K‖_F "
        f"({error.allowed:.2g} allowed); largest sampled entry error {error.max_pair_error:.2g} of √(K_rr K_cc){suffix}"
    )


def _meaning(found: "StoreDescription") -> str:
    spectrum = "eigenvalue" if found.num_col_samples is None else "singular value"
    return f"no {spectrum}{' of a matrix' if found.output == 'diagonal' else ''} is"


def certificate_summary(found: "StoreDescription") -> str:
    """Write the bounds of all dtypes in one line."""
    if found.certificate is None:
        return "not certified"
    if found.inaccuracy is not None:
        return f"WRONG. {found.inaccuracy}"
    bounds = ", ".join(
        f"{error.bound:.3g} in {error.dtype} ({error.relative_bound:.2g} of ‖K‖_F)"
        for error in found.certificate.errors
    )
    return f"{_meaning(found)} off by more than {bounds}, with 95 % confidence"
