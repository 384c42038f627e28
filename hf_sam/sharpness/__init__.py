"""Measures of how flat the loss is around a trained checkpoint."""

from .callback import SharpnessCallback
from .estimators import (
    Eigenvalues,
    Estimate,
    SpectralDensity,
    hutchinson_trace,
    most_negative_eigenvalue,
    spectral_density,
    top_eigenvalues,
)
from .landscape import Line, filter_normalised_direction, line_between, slice_1d, slice_2d
from .loss import SubsetLoss
from .measures import Objective, average_sharpness, m_sharpness, objective, sam_sharpness, worst_case_sharpness
from .operators import GaussNewton, Hessian
from .profile import SharpnessConfig, measure, scalars
from .subset import Subset

__all__ = [
    "Eigenvalues",
    "Estimate",
    "GaussNewton",
    "Hessian",
    "Line",
    "Objective",
    "SharpnessCallback",
    "SharpnessConfig",
    "SpectralDensity",
    "Subset",
    "SubsetLoss",
    "average_sharpness",
    "filter_normalised_direction",
    "hutchinson_trace",
    "line_between",
    "m_sharpness",
    "measure",
    "most_negative_eigenvalue",
    "objective",
    "sam_sharpness",
    "scalars",
    "slice_1d",
    "slice_2d",
    "spectral_density",
    "top_eigenvalues",
    "worst_case_sharpness",
]
