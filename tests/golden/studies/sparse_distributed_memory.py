"""Common neurons, weights of a read, and the beta that comes nearest."""

from regard.studies.sparse_distributed_memory import circle_intersection, fitted_beta, sparse_distributed_memory

from .. import Case, Source

SOURCE = Source("authors", "TrentBrick/attention-approximates-sdm, expected_intersection_lune and fit_beta_regression")
TOLERANCE = {"output": 1e-6}  # read in single precision


def compare(case: Case):
    dim, radius = case.settings["dim"], case.settings["radius"]
    return {
        "intersection": circle_intersection(dim, radius) * 2.0**dim,  # of so many neurons
        "output": sparse_distributed_memory(case["query"], case["key"], radius=radius),
        "beta": fitted_beta(dim, radius)[0]
        * radius
        / (radius - 1),  # its covariance is over n - 1, its variance over n
    }
