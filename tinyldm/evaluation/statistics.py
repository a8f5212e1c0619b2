"""Image metrics, from NumPy arrays alone: no model, no files."""

from collections.abc import Callable, Iterator, Sequence
from math import isqrt

import numpy as np
from scipy.linalg import orthogonal_procrustes
from scipy.ndimage import gaussian_filter

BLOCK = 2**22  # float64 values that one block of a large product holds: 32 MiB
WINDOW = 11  # pixels along each side that SSIM compares at a time
TAIL = 0.05  # share of held-out images, the nearest to training images, that pass for copies


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of values (n,), and its standard error: their standard deviation / √n."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(values.mean()), float(error)


def mean_along(values: Sequence[float]) -> tuple[float, float]:
    """Mean of values (n,) with a trend, and its standard error by the differences of neighbours.

    The trend is the same for every sample, and adds nothing to the error (von Neumann 1941).
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    error = np.sqrt(np.square(np.diff(values)).sum() / (2 * (n - 1) * n)) if n > 1 else np.inf
    return float(values.mean()), float(error)


def share_error(share: float, n: int) -> float:
    """Standard error of a share of n, that of two more hits and two more misses.

    So it is not 0 where all of them are hits (Agresti & Coull 1998).
    """
    corrected = (share * n + 2) / (n + 4)
    return float(np.sqrt(corrected * (1 - corrected) / (n + 4)))


def jackknife(
    statistic: Callable[[np.ndarray], np.ndarray], sample: np.ndarray, groups: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Compute a statistic of a sample (n, …), and its standard error by the jackknife.

    One of g groups is left out at a time, and √((g − 1) / g · Σ (θ_i − mean θ)²) is the error
    (Tukey 1958; Efron & Stein 1981). It is infinite for fewer rows than 2 g.
    """
    value = np.asarray(statistic(sample))
    if len(sample) < 2 * groups:
        return value, np.full(value.shape, np.inf)
    members = np.arange(len(sample)) % groups
    without = np.array([statistic(sample[members != i]) for i in range(groups)])
    spread = np.square(without - without.mean(axis=0)).sum(axis=0)
    return value, np.sqrt((groups - 1) / groups * spread)


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each image, uint8 (n, h, w, 3) → (n,).

    10 log₁₀(255² / mean squared error): 30 looks soft, 40 is hard to tell apart, equal images
    have 148. ValueError for anything but two such arrays of one shape.
    """
    _check_alike(images, truth)
    error = [
        np.square(np.subtract(x, y, dtype=np.float64)).mean()
        for x, y in zip(images, truth, strict=True)
    ]
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def ssim(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, uint8 (n, h, w, 3) → (n,), over positions and channels.

    It compares local structure: 1 is equal, 0 unrelated. Wang, Bovik, Sheikh and
    Simoncelli (2004), equation 13, in a Gaussian window of σ = 1.5 and 11×11 pixels, wherever it
    fits. Along a shorter side the image is extended by its mirror image, and every pixel is
    compared. ValueError for anything but two such arrays of one shape.
    """
    _check_alike(images, truth)
    inside = tuple(
        slice(WINDOW // 2, -(WINDOW // 2)) if side >= WINDOW else slice(None)
        for side in images.shape[1:3]
    )
    stabiliser, contrast_stabiliser = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = []
    for image, original in zip(images, truth, strict=True):
        x, y = image.astype(np.float64), original.astype(np.float64)
        products = np.stack([x, y, x * x, y * y, x * y])
        means = gaussian_filter(products, (0, 1.5, 1.5, 0), radius=WINDOW // 2)
        x, y, xx, yy, xy = means[:, *inside]
        luminance = (2 * x * y + stabiliser) / (x * x + y * y + stabiliser)
        covariance, variances = xy - x * y, (xx - x * x) + (yy - y * y)
        structure = (2 * covariance + contrast_stabiliser) / (variances + contrast_stabiliser)
        similarity.append((luminance * structure).mean())
    return np.array(similarity)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians through two sets of features, (n, d) and (m, d).

    It compares mean and covariance of two sets of images: 0 is alike. Heusel et al. (2017),
    equation 6: |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½). Few images make it larger, so only
    distances of equal n and m compare. ValueError for features that are not finite, or
    fewer than two.
    """
    a, b = _check_features(a, b)
    # With Σ = RᵀR the trace is the least |R_aᵀQ − R_bᵀ|² over orthogonal Q (Masarotto, Panaretos
    # and Zemel 2019): no root of a matrix, and no difference of large numbers.
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    q, _ = orthogonal_procrustes(root_a.T, root_b.T)
    means = a.mean(axis=0) - b.mean(axis=0)
    return float(np.square(means).sum() + np.square(root_a.T @ q - root_b.T).sum())


def _covariance_root(features: np.ndarray) -> np.ndarray:
    """Return R (d, d) such that RᵀR is the covariance of features (n, d), of any rank."""
    n, d = features.shape
    r = np.linalg.qr((features - features.mean(axis=0)) / np.sqrt(n - 1), mode="r")
    return np.pad(r, ((0, d - len(r)), (0, 0)))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel distance (KID) of two sets of features, (n, d) and (m, d).

    It compares every moment of two sets of images up to the third: 0 is alike. Its mean over sets
    of one distribution is 0 at any n and m, so it may be negative. Bińkowski et al. (2018),
    section 4: Gretton et al. (2012), equation 3, with the kernel (x·y / d + 1)³. ValueError for
    features that are not finite, or fewer than two.
    """
    a, b = _check_features(a, b)
    across = _kernel_sum(a, b) / (len(a) * len(b))
    return float(_kernel_mean(a) + _kernel_mean(b) - 2 * across)


def _kernel_mean(x: np.ndarray) -> float:
    """Compute the mean of the kernel over all pairs of different rows."""
    n, d = x.shape
    equal = (np.square(x).sum(axis=1) / d + 1) ** 3
    return (_kernel_sum(x, x) - equal.sum()) / (n * (n - 1))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    d = a.shape[1]
    return sum(((a[rows] @ b.T / d + 1) ** 3).sum() for rows in _blocks(len(a), len(b)))


def precision_recall(made: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features (n, d) and (m, d): fidelity and diversity, shares 0…1.

    Precision: the share of `made` that lie within the k-nearest-neighbour distance of a real one.
    Recall: the share of `real` that lie near `made` in the same way. Kynkäänniemi et al. 2019,
    section 2. ValueError for fewer than k + 1 of either.
    """
    made, real = _check_features(made, real)
    if min(len(made), len(real)) <= k:
        raise ValueError(f"expected more than {k} of each, found {len(made)} and {len(real)}")

    def squares(a, b):
        return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T), 0)

    def within(a):
        """Return the squared radius around each: to its k-th nearest, itself not counted."""
        return np.partition(squares(a, a), k, axis=1)[:, k]

    between = squares(made, real)
    precision = (between <= within(real)).any(axis=1).mean()
    recall = (between <= within(made)[:, None]).any(axis=0).mean()
    return float(precision), float(recall)


def nearest_images(queries: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the image nearest to each query, and its distance: index and distance, (q,) each.

    queries: uint8 (q, h, w, 3); images: uint8 (n, h, w, 3), of which a few hundred are unpacked
    at a time. Distances are root mean square differences in levels of 255, exactly 0 for a copy;
    the first of equals is taken. ValueError for other arrays, or images of another size.
    """
    _check_images("queries", queries)
    _check_images("images", images)
    if queries.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"images: expected {queries.shape[1:]} each, as queries, found {images.shape[1:]}"
        )
    index = np.zeros(len(queries), np.intp)
    least = np.full(len(queries), np.inf)
    size = queries[0].size
    width = max(size, isqrt(BLOCK))  # so that the distances fit into a block, too
    for rows in _blocks(len(queries), width):
        a, a_square = _unpack(queries[rows])
        for columns in _blocks(len(images), width):
            b, b_square = _unpack(images[columns])
            # |a − b|², exact because all are integers below 2⁵³; in float32 most would not be.
            square = a_square[:, None] + b_square - 2 * (a @ b.T)
            at = square.argmin(axis=1)
            square = square[np.arange(len(a)), at]
            index[rows] = np.where(square < least[rows], columns.start + at, index[rows])
            least[rows] = np.minimum(square, least[rows])
    return index, np.sqrt(least / size)


def _unpack(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack images to float64 rows (n, h·w·3) → the rows, and the squared length of each."""
    x = images.reshape(len(images), -1).astype(np.float64)
    return x, np.einsum("ij,ij->i", x, x)


def copied(samples_distance: np.ndarray, real_distance: np.ndarray) -> float:
    """Estimate the share of samples as near to training images as the nearest 5 % of held-out ones.

    About 0.05 where nothing is copied, towards 1 where everything is. The distances, (n,) and
    (m,), are those that `nearest_images` finds in the training images; held-out images as the
    reference are the idea of Meehan, Chaudhuri and Dasgupta (2020). Blurred images are near
    to many: a high share is a reason to look at the pairs, not a proof. With m < 19 the nearest
    held-out image is the limit, and 1 / (m + 1) is expected. ValueError for distances that are
    not finite, or none.
    """
    named = {"samples_distance": samples_distance, "real_distance": real_distance}
    for name, distance in named.items():
        if distance.ndim != 1 or not distance.size or not _finite(distance):
            raise ValueError(f"{name}: expected finite values (n ≥ 1,), {_found(distance)}")
    # Weibull's quantile is the one that a new draw falls below in 5 % of cases even at small m.
    limit = np.quantile(real_distance, TAIL, method="weibull")
    return float(np.mean(samples_distance <= limit))


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Yield slices of n rows such that each, `width` values a row, holds at most BLOCK."""
    step = max(1, BLOCK // width)
    return (slice(start, start + step) for start in range(0, n, step))


def _check_images(name: str, x: np.ndarray) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
        raise ValueError(f"{name}: expected uint8 (n, h, w, 3), {_found(x)}")


def _check_alike(images: np.ndarray, truth: np.ndarray) -> None:
    _check_images("images", images)
    _check_images("truth", truth)
    if images.shape != truth.shape:
        raise ValueError(f"truth: expected {images.shape}, as images, found {truth.shape}")


def _check_features(*sets: np.ndarray) -> list[np.ndarray]:
    """Convert both sets to float64, checked."""
    d = sets[0].shape[-1] if sets[0].ndim else 0
    for name, x in zip("ab", sets, strict=True):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != d or d == 0 or not _finite(x):
            raise ValueError(f"{name}: expected finite values (n ≥ 2, {d or 'd'}), {_found(x)}")
    return [x.astype(np.float64) for x in sets]


def _finite(x: np.ndarray) -> bool:
    return x.dtype.kind in "fiu" and bool(np.isfinite(x).all())


def _found(x: np.ndarray) -> str:
    endless = x.dtype.kind == "f" and not _finite(x)
    return f"found {x.dtype} {x.shape}" + endless * ", not all finite"
