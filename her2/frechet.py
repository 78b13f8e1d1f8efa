"""Distances between two sets of feature vectors: are the generated images distributed as the real ones?

    Frechet distance   |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^1/2)     (Heusel et al., 2017: "FID")
    kernel distance    unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3           (Binkowski et al., 2018: "KID")

The first assumes Gaussians and is biased upwards for few samples; the second has no bias, so that it scatters
around 0, below it too, for two samples of one law. The features are the caller's choice. PAPER: it reports no
such distance; the usual Inception features, learned from photographs, mean little for stained tissue.

Differs from the official code (pytorch-fid: scipy's sqrtm of C1 C2, which is not symmetric, with a retry when
it is singular): tr((C1 C2)^1/2) is the sum of the square roots of the eigenvalues of the symmetric C1^1/2 C2
C1^1/2, which are the same numbers, real and, up to rounding, not negative. The result is clamped at 0.

Key: N samples, D features.
"""

import numpy as np


def feature_statistics(features) -> tuple[np.ndarray, np.ndarray]:
    """(N, D), N >= 2 -> mean (D,), covariance (D, D) with the factor 1 / (N - 1), in float64."""
    x = np.asarray(features, dtype=np.float64)
    assert x.ndim == 2 and len(x) >= 2, f"features are (N, D) with N >= 2, found {x.shape}"
    # float64: a covariance of float32 features loses half its digits in the subtraction of the mean.
    return x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """Between the Gaussians N(mu1, cov1) and N(mu2, cov2): means (D,), covariances (D, D), any rank."""
    mu1, cov1, mu2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, cov1, mu2, cov2))
    assert mu1.shape == mu2.shape and cov1.shape == cov2.shape == (len(mu1), len(mu1)), \
        f"means (D,), covariances (D, D); found {mu1.shape} {cov1.shape} {mu2.shape} {cov2.shape}"
    values, vectors = np.linalg.eigh(cov1)                                        # (D,), (D, D)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T                    # C1^1/2
    # Eigenvalues of a product do not depend on its order: those of C1 C2 are those of C1^1/2 C2 C1^1/2, which
    # is symmetric. Rounding makes small ones negative where N <= D: hence the clips.
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()   # tr((C1 C2)^1/2)
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap))


def kernel_distance(a, b) -> float:
    """Unbiased squared maximum mean discrepancy of the samples a (N, D) and b (M, D); may be below 0."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    assert a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= 2, \
        f"samples are (N, D) and (M, D) with N, M >= 2, found {a.shape} and {b.shape}"

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3             # cubic: compares moments up to the third

    def mean_of_pairs(x):  # without the pairs of a sample with itself: that is what removes the bias
        k = kernel(x, x)                                                # (N, N)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())
