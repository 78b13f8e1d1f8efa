"""Smooth random fields and wobbly outlines: the two shapes that everything in the phantom is made of.

Noise       a periodic grid of independent normal numbers, smoothed: on an axis-aligned tile by the cubic
            B-spline, value(y, x) = sum_i B(y - i) sum_j B(x - j) grid[i, j], at scattered points linearly.
Star        an outline r(theta) around a centre. Its signed distance is approximated to first order,
                (rho - r) / sqrt(1 + (r' / r) ** 2),   rho = distance of the point from the centre,
            exact on the outline and good to a few percent within a cell of it.

All lengths are micrometres. Letters: (h, w) rows and columns of a tile, n points.
"""

import numpy as np

PERIOD, ANGLES = 256, 96                            # sides of a grid of noise, radii of an outline
THETA = np.arange(ANGLES) * (2 * np.pi / ANGLES)    # directions of an outline's radii
# Standard deviation of the smoothed field for a grid of variance 1: the integral of the squared kernel of the
# cubic B-spline and of the linear one, once per axis.
SPLINE_SD, LINEAR_SD = 151 / 315, 2 / 3


def smooth(grid, ys, xs, scale: float) -> np.ndarray:
    """A field of mean 0 and variance 1, correlated over about `scale` um, on ys x xs: (h, w) float32."""
    # Separable: two passes of four rows each instead of sixteen gathers per pixel. Columns first, on the
    # transposed grid, so that both passes gather whole rows.
    for positions in (xs, ys):
        t = np.asarray(positions, dtype=np.float64) / scale
        i = np.floor(t).astype(np.int64)
        f = t - i
        weights = ((1 - f) ** 3 / 6, (3 * f ** 3 - 6 * f ** 2 + 4) / 6,
                   (-3 * f ** 3 + 3 * f ** 2 + 3 * f + 1) / 6, f ** 3 / 6)          # of rows i - 1 .. i + 2
        rows = np.ascontiguousarray(grid.T)                             # (PERIOD, PERIOD), then (PERIOD, w)
        grid = sum(weight.astype(np.float32)[:, None] * rows[(i - 1 + k) % PERIOD]
                   for k, weight in enumerate(weights))                 # (w, PERIOD), then (h, w)
    return grid / np.float32(SPLINE_SD)


def stretched(grid, y, x, scale_y: float, scale_x: float) -> np.ndarray:
    """The same law at any points, by two scales: long and thin ones give fibres."""
    return bilinear(grid, y / scale_y, x / scale_x) / np.float32(LINEAR_SD)


def bilinear(grid, y, x) -> np.ndarray:
    """Values of a periodic grid at any points, in units of its spacing; of others, not at the border."""
    i, j = np.floor(y).astype(np.int32), np.floor(x).astype(np.int32)
    fy, fx = (y - i).astype(np.float32), (x - j).astype(np.float32)     # shares of the next row and column
    (i0, i1), (j0, j1) = ((k % n, (k + 1) % n) for k, n in zip((i, j), grid.shape))
    low = grid[i0, j0] * (1 - fx) + grid[i0, j1] * fx
    high = grid[i1, j0] * (1 - fx) + grid[i1, j1] * fx
    return low * (1 - fy) + high * fy


def ramp(value, width) -> np.ndarray:
    """0 below -width, 1 above +width, smooth between: a cheap soft threshold."""
    t = np.clip(value / (2 * width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def turned(x, y, angle) -> tuple:
    """Points (x, y) in axes turned by `angle`: (along it, across it)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return x * cosine + y * sine, y * cosine - x * sine


class Star:
    """A closed outline around (x, y): radii r(THETA)."""

    def __init__(self, x: float, y: float, radii: np.ndarray):
        assert radii.shape == (ANGLES,) and radii.min() > 0, f"{ANGLES} positive radii, found {radii.shape}"
        self.x, self.y, self.radii = x, y, radii.astype(np.float64)
        self.slope = (np.roll(radii, -1) - np.roll(radii, 1)) / (4 * np.pi / ANGLES) / radii

    def distance(self, x, y) -> np.ndarray:
        """Signed distance of points from the outline, negative inside."""
        dx, dy = x - self.x, y - self.y
        rho, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
        t = angle * (ANGLES / (2 * np.pi)) % ANGLES
        k = t.astype(np.int32) % ANGLES
        f = t - np.floor(t)
        radius = self.radii[k] * (1 - f) + self.radii[(k + 1) % ANGLES] * f
        return (rho - radius) / np.sqrt(1 + self.slope[k] ** 2)

    def ring(self, depth: float, spacing: float, rng) -> np.ndarray:
        """(n, 3): x, y and tangent angle of points about `spacing` apart, `depth` inside the outline."""
        radii = self.radii - depth
        count = int(2 * np.pi * max(radii.mean(), 0) / spacing)
        if count < 3:                                   # too small a site for a layer this deep
            return np.zeros((0, 3))
        angle = (np.arange(count) + rng.uniform(-0.25, 0.25, count) + rng.random()) * (2 * np.pi / count)
        k = (angle * (ANGLES / (2 * np.pi))).astype(int) % ANGLES
        radius = np.maximum(radii[k], 0.1)
        return np.stack([self.x + radius * np.cos(angle), self.y + radius * np.sin(angle),
                         angle + np.pi / 2 - np.arctan(self.slope[k])], axis=1)

    def polygon(self, spacing: float, wobble: float, rng) -> np.ndarray:
        """(n, 2) vertices as a hand would click them: about `spacing` apart, off by `wobble` (normal)."""
        count = max(8, int(2 * np.pi * self.radii.mean() / spacing))
        angle = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * (2 * np.pi / count)
        radius = np.interp(angle, np.arange(-ANGLES, 2 * ANGLES) * THETA[1], np.tile(self.radii, 3))
        radius = np.maximum(radius + wobble * rng.standard_normal(count), 1.0)
        return np.stack([self.x + radius * np.cos(angle), self.y + radius * np.sin(angle)], axis=1)


def wobbly_radii(radius: float, wobble: float, aspect: float, angle: float, rng) -> np.ndarray:
    """(ANGLES,) radii of an ellipse of the same area, with harmonics 2..7 of falling strength on it."""
    radii = radius / np.sqrt(np.cos(THETA - angle) ** 2 / aspect + np.sin(THETA - angle) ** 2 * aspect)
    for k in range(2, 8):
        strength = wobble * rng.standard_normal() / k ** 0.8
        radii = radii * (1 + strength * np.cos(k * THETA + rng.uniform(0, 2 * np.pi)))
    return radii.clip(0.35 * radius, 2.2 * radius)


def squeeze(radii, site: int, x, y, weight, gap: float) -> np.ndarray:
    """Cut the outline of one site where its neighbours begin, leaving `gap` between them (a septum). The
    border to site j is the line of equal power distance (a Voronoi cell with weights): along the direction u
    it lies at ((d^2 + w^2 - w_j^2) / (2 d)) / cos(angle between u and the neighbour)."""
    dx, dy, others = (np.delete(one, site) for one in (x - x[site], y - y[site], weight))
    d = np.maximum(np.hypot(dx, dy), 1e-6)
    border = (d ** 2 + weight[site] ** 2 - others ** 2) / (2 * d) - gap / 2
    cosine = (np.cos(THETA)[:, None] * dx + np.sin(THETA)[:, None] * dy) / d
    limit = np.where(cosine > 1e-3, border / np.maximum(cosine, 1e-3), np.inf)
    radii = np.minimum(radii, limit.min(axis=1, initial=np.inf)).clip(0.2 * weight[site])
    kernel = np.array([1, 3, 4, 3, 1]) / 12  # the corners of a Voronoi cell, rounded as tissue is
    return sum(weight_k * np.roll(radii, k - 2) for k, weight_k in enumerate(kernel))
