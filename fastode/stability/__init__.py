"""What the papers argue with, as measurements: C-stability, Theorem 1, growth ratios, variances, and flows."""

from .flows import Burgers, Orthogonality, burgers, lyapunov_exponent, skew_orthogonality
from .networks import (
    BlockStability,
    Comparison,
    Variance,
    c_stability,
    growth_ratio,
    predicted_variance,
    theorem1,
    variance,
)
from .plots import (
    plot_burgers,
    plot_c_stability,
    plot_growth,
    plot_lyapunov,
    plot_orthogonality,
    plot_theorem1,
    plot_variance,
)
from .products import Products, Singular, singular_value

__all__ = [
    "BlockStability",
    "Burgers",
    "Comparison",
    "Orthogonality",
    "Products",
    "Singular",
    "Variance",
    "burgers",
    "c_stability",
    "growth_ratio",
    "lyapunov_exponent",
    "plot_burgers",
    "plot_c_stability",
    "plot_growth",
    "plot_lyapunov",
    "plot_orthogonality",
    "plot_theorem1",
    "plot_variance",
    "predicted_variance",
    "singular_value",
    "skew_orthogonality",
    "theorem1",
    "variance",
]
