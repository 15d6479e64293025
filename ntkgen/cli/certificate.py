"""The certificate of a store, as it is printed."""

from typing import Any


def certificate_lines(values: dict[str, Any]) -> dict[str, str]:
    """Write the certificate of a described store, a line for each dtype, and what it means."""
    found = values["certificate"]
    if found is None:
        if values.get("model") is None:
            return {"certificate": "none: the network is not known here"}
        return {"certificate": "none yet; the same `ntkgen compute` makes one, or `ntkgen verify --certify`"}
    lines = {error["dtype"]: _error_line(error) for error in found["errors"]}
    wrong = values["inaccuracy"]
    return {
        "certificate": f"of E, stored − exact kernel, by {_sampled(found, values)}{_compared_in(found)}",
        **lines,
        "": f"{_meaning(values)} off by more than the bound on ‖E‖_F",
        **({} if wrong is None else {"WRONG": wrong}),
    }


def _sampled(found: dict[str, Any], values: dict[str, Any]) -> str:
    count = found.get("num_pair_outputs")
    some = "" if count in {None, values["num_logits"]} else f" ({count} outputs of each)"
    return f"{found['num_probes']} probes and {found['num_pairs']} pairs of samples{some}, seed {found['seed']}"


def _compared_in(found: dict[str, Any]) -> str:
    dtype = found.get("exact_dtype", "float64")
    return "" if dtype == "float64" else f"; the exact one in {dtype}, since the network cannot be run in float64"


def _error_line(error: dict[str, Any]) -> str:
    suspicious = error["suspicious"]
    suffix = f"; SUSPICIOUS rows of blocks {', '.join(map(str, suspicious))}" if suspicious else ""
    allowed = f" ({error['allowed']:.2g} allowed)" if "allowed" in error else ""
    return (
        f"‖E‖_F ≤ {error['bound']:.3g} with 95 % confidence, {error['relative_bound']:.2g} of ‖K‖_F{allowed}; "
        f"largest sampled entry error {error['max_pair_error']:.2g} of √(K_rr K_cc){suffix}"
    )


def _meaning(values: dict[str, Any]) -> str:
    spectrum = "eigenvalue" if values["num_col_samples"] is None else "singular value"
    return f"no {spectrum}{' of a matrix' if values['output'] == 'diagonal' else ''} is"


def certificate_summary(values: dict[str, Any]) -> str:
    """Write the bounds of all dtypes in one line."""
    found = values["certificate"]
    if found is None:
        return "not certified"
    if values["inaccuracy"] is not None:
        return f"WRONG. {values['inaccuracy']}"
    bounds = ", ".join(
        f"{e['bound']:.3g} in {e['dtype']} ({e['relative_bound']:.2g} of ‖K‖_F)" for e in found["errors"]
    )
    return f"{_meaning(values)} off by more than {bounds}, with 95 % confidence"
