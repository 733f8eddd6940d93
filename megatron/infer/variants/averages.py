"""Correlations over many assays as ProteinGym averages them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_RESAMPLES = 10_000

Facts = Mapping[str, Any]  # of an assay: those that `record` keeps


def averaged(assays: Sequence[Facts]) -> dict[str, Any]:
    """The mean correlation for each category and over all categories. Uses the assays that have a correlation, a
    protein and a category.

    Assays of the same protein and category are averaged first, then the proteins of a category, then the categories, so
    that a protein measured often counts once (as in ProteinGym's `performance_DMS_benchmarks.py`). `standard_error` of
    the average: the standard deviation over 10,000 resamples of the proteins within each category. Empty if no assay
    has all three.
    """
    of_protein: dict[str, dict[str, list[float]]] = {}
    for facts in assays:
        if facts["spearman"] is not None and facts["uniprot"] and facts["category"]:
            of_category = of_protein.setdefault(facts["category"], {})
            of_category.setdefault(facts["uniprot"], []).append(facts["spearman"])
    if not of_protein:
        return {}
    means = {category: np.array([np.mean(values) for values in proteins.values()])
             for category, proteins in sorted(of_protein.items())}
    generator = np.random.default_rng(0)
    resampled = np.mean([values[generator.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1)
                         for values in means.values()], axis=0)
    return {"spearman": float(np.mean([values.mean() for values in means.values()])),
            "standard_error": float(resampled.std(ddof=1)),
            "categories": {category: {"spearman": float(values.mean()), "proteins": len(values)}
                           for category, values in means.items()}}
