"""Analysis of stored kernels without torch, also of kernels that are larger than memory.

Each question is a function of a matrix: `answer = question(matrix, Settings(...), report=…)`. Each public name imports
its modules when it is first used.
"""

from typing import TYPE_CHECKING

from ntkgen.lazy import lazy_names

if TYPE_CHECKING:
    from ntkgen.analysis.alignment import AlignAnswer as AlignAnswer
    from ntkgen.analysis.alignment import AlignSettings as AlignSettings
    from ntkgen.analysis.alignment import align as align
    from ntkgen.analysis.comparison import CompareAnswer as CompareAnswer
    from ntkgen.analysis.comparison import CompareSettings as CompareSettings
    from ntkgen.analysis.comparison import compare as compare
    from ntkgen.analysis.determinant import LogdetAnswer as LogdetAnswer
    from ntkgen.analysis.determinant import LogdetSettings as LogdetSettings
    from ntkgen.analysis.determinant import logdet as logdet
    from ntkgen.analysis.eigenvalue_density import DensityAnswer as DensityAnswer
    from ntkgen.analysis.eigenvalue_density import DensitySettings as DensitySettings
    from ntkgen.analysis.eigenvalue_density import density as density
    from ntkgen.analysis.eigenvalues import SpectrumAnswer as SpectrumAnswer
    from ntkgen.analysis.eigenvalues import SpectrumSettings as SpectrumSettings
    from ntkgen.analysis.eigenvalues import spectrum as spectrum
    from ntkgen.analysis.extrapolation import ExtrapolateAnswer as ExtrapolateAnswer
    from ntkgen.analysis.extrapolation import ExtrapolateSettings as ExtrapolateSettings
    from ntkgen.analysis.extrapolation import extrapolate as extrapolate
    from ntkgen.analysis.gradient_flow import FlowAnswer as FlowAnswer
    from ntkgen.analysis.gradient_flow import FlowSettings as FlowSettings
    from ntkgen.analysis.gradient_flow import flow as flow
    from ntkgen.analysis.matrix import Matrix as Matrix
    from ntkgen.analysis.matrix import open_matrix as open_matrix
    from ntkgen.analysis.regression import RegressAnswer as RegressAnswer
    from ntkgen.analysis.regression import RegressSettings as RegressSettings
    from ntkgen.analysis.regression import regress as regress

# No module has the name of its function: Python would bind the module to that name when it is loaded.
_EXPORTS = {
    "alignment": ("AlignAnswer", "AlignSettings", "align"),
    "comparison": ("CompareAnswer", "CompareSettings", "compare"),
    "determinant": ("LogdetAnswer", "LogdetSettings", "logdet"),
    "eigenvalue_density": ("DensityAnswer", "DensitySettings", "density"),
    "eigenvalues": ("SpectrumAnswer", "SpectrumSettings", "spectrum"),
    "extrapolation": ("ExtrapolateAnswer", "ExtrapolateSettings", "extrapolate"),
    "gradient_flow": ("FlowAnswer", "FlowSettings", "flow"),
    "matrix": ("Matrix", "open_matrix"),
    "regression": ("RegressAnswer", "RegressSettings", "regress"),
}

__all__ = [
    "AlignAnswer",
    "AlignSettings",
    "CompareAnswer",
    "CompareSettings",
    "DensityAnswer",
    "DensitySettings",
    "ExtrapolateAnswer",
    "ExtrapolateSettings",
    "FlowAnswer",
    "FlowSettings",
    "LogdetAnswer",
    "LogdetSettings",
    "Matrix",
    "RegressAnswer",
    "RegressSettings",
    "SpectrumAnswer",
    "SpectrumSettings",
    "align",
    "compare",
    "density",
    "extrapolate",
    "flow",
    "logdet",
    "open_matrix",
    "regress",
    "spectrum",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, {name: f"ntkgen.analysis.{module}" for module, names in _EXPORTS.items() for name in names}
    )
