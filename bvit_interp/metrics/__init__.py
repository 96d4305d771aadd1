"""Pure measures: tensors in, tensors out.

Shapes: B images, T steps, H heads, P patches; `...` are any leading axes.
"""

from bvit_interp.metrics.maps import correlations, entropy, grid_distances, unit_maps
from bvit_interp.metrics.overlap import (
    independent_jaccard,
    independent_specialization,
    independent_utilisation,
    jaccard,
    specialization,
    utilisation,
)
from bvit_interp.metrics.pointing import at_patch_centres, dilate, point_hits
from bvit_interp.metrics.spectra import (
    energy_rank,
    participation_ratio,
    random_energy_rank,
    random_participation_ratio,
    singular_values_of_gram,
    spectral_centroid,
)
from bvit_interp.metrics.statistics import (
    bootstrap_means,
    interval,
    mean_over_images,
    one_vs_rest,
    pairing_p_value,
    rank_trend,
    shuffled_rows,
    wilson_interval,
)

__all__ = [
    "at_patch_centres",
    "bootstrap_means",
    "correlations",
    "dilate",
    "energy_rank",
    "entropy",
    "grid_distances",
    "independent_jaccard",
    "independent_specialization",
    "independent_utilisation",
    "interval",
    "jaccard",
    "mean_over_images",
    "one_vs_rest",
    "pairing_p_value",
    "participation_ratio",
    "point_hits",
    "random_energy_rank",
    "random_participation_ratio",
    "rank_trend",
    "shuffled_rows",
    "singular_values_of_gram",
    "specialization",
    "spectral_centroid",
    "unit_maps",
    "utilisation",
    "wilson_interval",
]
