"""The numbers that judge images: closed forms, slow versions of the definitions, invariances."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.evaluation import statistics
from tinyldm.evaluation.statistics import (
    copied,
    frechet_distance,
    jackknife,
    kernel_distance,
    mean_along,
    mean_and_error,
    nearest_images,
    precision_recall,
    psnr,
    share_error,
    ssim,
)

seeds = st.integers(0, 2**32 - 1)
few = st.integers(1, 4)
sides = st.integers(1, 6)
counts = st.integers(2, 12)  # of feature vectors: some fewer, some more than dimensions
dimensions = st.integers(1, 6)


def images_of(rng, n=1, h=8, w=8):
    return rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def features_of(rng, n, d):
    """Features with correlations and a mean."""
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def gaussian(rng, n, mean, root):
    """n features with exactly this mean (d,) and the covariance rootᵀ root, root (d, d)."""
    x = rng.standard_normal((n, len(mean)))
    q, _ = np.linalg.qr(x - x.mean(0))
    return mean + np.sqrt(n - 1) * q @ root


def rotation(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


# --------------------------------------------------------------------------------- standard errors


@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize(
    "statistic",
    [np.mean, np.median, np.var, lambda x: np.array([x.mean(), np.median(x)])],
    ids=["mean", "median", "variance", "two at once"],
)
def test_the_jackknife_says_how_far_another_sample_would_be(n, statistic):
    rng = np.random.default_rng(n)
    found = [jackknife(statistic, rng.normal(3, 2, n)) for _ in range(200)]
    values, errors = (np.array(column) for column in zip(*found, strict=True))
    ratio = values.std(axis=0) / np.sqrt(np.square(errors).mean(axis=0))
    assert ((ratio > 0.75) & (ratio < 1.25)).all()


def test_the_jackknife_of_a_mean_is_the_usual_standard_error():
    """The jackknife's error of a mean is the standard error of the means of its groups, exactly."""
    x = np.random.default_rng(0).normal(size=50)
    value, error = jackknife(np.mean, x, groups=25)
    assert value == x.mean()
    pairs = x.reshape(2, 25).mean(axis=0)
    assert error == pytest.approx(pairs.std(ddof=1) / 5)
    assert mean_and_error(x) == pytest.approx((x.mean(), x.std(ddof=1) / 50**0.5))


def test_a_trend_adds_nothing_to_the_error_of_a_mean():
    rng, trend = np.random.default_rng(0), np.linspace(0, 10, 100)
    found = np.array([mean_along(trend + rng.normal(0, 1, 100)) for _ in range(200)])
    assert 0.85 < found[:, 0].std() / found[:, 1].mean() < 1.15
    assert mean_and_error(trend + rng.normal(0, 1, 100))[1] > 2.5 * found[:, 1].mean()


def test_too_few_have_no_known_error():
    assert jackknife(np.mean, np.ones(19))[1] == np.inf
    assert mean_and_error([2.0]) == mean_along([2.0]) == (2.0, np.inf)


@given(st.integers(1, 500), st.floats(0, 1))
def test_shares_have_an_error_even_where_all_are_hits(n, share):
    hits = round(share * n)
    error = share_error(hits / n, n)
    assert 0 < error <= 0.5 / (n + 4) ** 0.5
    assert error == pytest.approx(share_error(1 - hits / n, n))
    if 50 < hits < n - 50:
        assert error == pytest.approx((hits / n * (1 - hits / n) / n) ** 0.5, rel=0.1)


# -------------------------------------------------------------------------------------------- PSNR


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(0, 148.13), (1, 48.13), (10, 28.13), (255, 0)],  # 20 log₁₀(255 / difference)
)
def test_psnr_of_a_known_difference(difference, expected):
    truth = np.zeros((2, 3, 5, 3), np.uint8)
    for pair in ((truth, truth + np.uint8(difference)), (truth + np.uint8(difference), truth)):
        assert psnr(*pair) == pytest.approx([expected] * 2, abs=0.005)


@given(few, sides, sides, seeds)
def test_psnr_is_that_of_each_image(n, h, w, seed):
    rng = np.random.default_rng(seed)
    a, b = images_of(rng, n, h, w), images_of(rng, n, h, w)
    each = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        squares = np.square(np.subtract(x, y)).ravel()
        each.append(10 * np.log10(255**2 / max(sum(squares) / len(squares), 1e-10)))
    assert psnr(a, b) == pytest.approx(each)


# -------------------------------------------------------------------------------------------- SSIM


def waves(h, w):
    """An image and a bad copy of it, without a generator of random numbers."""
    i, j, k = np.indices((h, w, 3))
    truth = (20 * i + 9 * j + 3 * i * j + 50 * k) % 256
    error = (7 * i * i + 5 * i * j + 11 * k) % 200 - 100
    return np.clip(truth + error, 0, 255).astype(np.uint8), truth.astype(np.uint8)


@pytest.mark.parametrize(
    ("h", "w", "expected"),
    [(11, 11, 0.8072288366281075), (12, 29, 0.7802394034784399), (64, 48, 0.7768457918623084)],
)
def test_ssim_is_that_of_scikit_image(h, w, expected):
    # skimage 0.26: structural_similarity(*waves(h, w), channel_axis=2, data_range=255,
    #     gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    image, truth = waves(h, w)
    assert ssim(image[None], truth[None]) == pytest.approx(expected, abs=1e-12)


def slow_ssim(x, y):
    """The definition, a window at a time, of two images (h, w, 3)."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    margins = [(0, 0) if side >= 11 else (5, 5) for side in x.shape[:2]]
    x, y = (np.pad(p.astype(float), [*margins, (0, 0)], mode="symmetric") for p in (x, y))
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            for c in range(3):
                p, q = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                m, n = (window * p).sum(), (window * q).sum()
                pp, qq = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
                pq = (window * (p - m) * (q - n)).sum()
                c1, c2 = 2.55**2, 7.65**2
                luminance = (2 * m * n + c1) / (m * m + n * n + c1)
                values.append(luminance * (2 * pq + c2) / (pp + qq + c2))
    return np.mean(values)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (10, 10), (7, 13), (12, 4), (11, 12)])
def test_ssim_agrees_with_the_definition_at_any_size(size):
    rng = np.random.default_rng(sum(size))
    a, b = images_of(rng, 2, *size), images_of(rng, 2, *size)
    expected = [slow_ssim(x, y) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)


@given(few, st.integers(1, 14), st.integers(1, 14), seeds)
def test_ssim_is_symmetric_and_one_for_equals(n, h, w, seed):
    rng = np.random.default_rng(seed)
    a, b = images_of(rng, n, h, w), images_of(rng, n, h, w)
    assert (ssim(a, a) == 1).all()
    assert (ssim(a, b) >= -1).all() and (ssim(a, b) < 1).all()
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert ssim(a, b) == pytest.approx(ssim(a[:, ::-1, ::-1], b[:, ::-1, ::-1]))
    assert ssim(a, b) == pytest.approx(ssim(a.swapaxes(1, 2), b.swapaxes(1, 2)))


def test_ssim_sees_structure_where_psnr_sees_none():
    rng = np.random.default_rng(0)
    truth = images_of(rng, 1, 32, 32) // 2 + 64
    brighter, noisy = truth + 20, truth + rng.choice(np.uint8([236, 20]), truth.shape)
    assert psnr(brighter, truth) == pytest.approx(psnr(noisy, truth))
    assert ssim(brighter, truth) > 0.95 > 0.9 > ssim(noisy, truth)


# ------------------------------------------------------------------------------- Fréchet distance


def textbook_frechet(a, b):
    """Heusel et al. (2017), equation 6, by the eigenvalues of the product of the covariances."""
    s, t = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * root


@given(counts, counts, dimensions, seeds)
def test_frechet_agrees_with_the_textbook(n, m, d, seed):
    rng = np.random.default_rng(seed)
    a, b = features_of(rng, n, d), features_of(rng, m, d)
    scale = np.square(a).sum() + np.square(b).sum()
    # The textbook takes roots of eigenvalues that should be 0 and are 1e-16.
    assert frechet_distance(a, b) == pytest.approx(textbook_frechet(a, b), abs=1e-6 * scale)


@given(dimensions, seeds)
def test_frechet_of_gaussians_that_share_their_axes(d, seed):
    """In one dimension (μ − ν)² + (σ − τ)²; along shared axes the sum of these."""
    rng = np.random.default_rng(seed)
    means, sigmas = rng.normal(0, 3, (2, d)), rng.uniform(0, 3, (2, d))
    axes = rotation(rng, d)
    a = gaussian(rng, d + 5, means[0], np.diag(sigmas[0])) @ axes
    b = gaussian(rng, d + 9, means[1], np.diag(sigmas[1])) @ axes
    expected = np.square(means[0] - means[1]).sum() + np.square(sigmas[0] - sigmas[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected)


@given(counts, counts, counts, dimensions, seeds)
def test_frechet_is_the_square_of_a_distance(n, m, k, d, seed):
    rng = np.random.default_rng(seed)
    a, b, c = (features_of(rng, count, d) for count in (n, m, k))
    ab, ac, bc = frechet_distance(a, b), frechet_distance(a, c), frechet_distance(b, c)
    assert min(ab, ac, bc) >= 0
    assert ab == pytest.approx(frechet_distance(b, a))
    assert np.sqrt(ac) <= np.sqrt(ab) + np.sqrt(bc) + 1e-9
    assert frechet_distance(a, rng.permutation(a)) < 1e-24 * np.square(a).sum()


@given(counts, counts, dimensions, seeds)
def test_frechet_does_not_see_order_place_or_direction(n, m, d, seed):
    rng = np.random.default_rng(seed)
    a, b = features_of(rng, n, d), features_of(rng, m, d)
    turn, shift = rotation(rng, d), rng.normal(0, 10, d)
    found = frechet_distance(a, b)
    assert frechet_distance(rng.permutation(a), rng.permutation(b)) == pytest.approx(found)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(found)
    assert frechet_distance(a + shift, b + shift) == pytest.approx(found)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * found)
    moved = np.square(a.mean(0) - b.mean(0) + shift).sum() - np.square(a.mean(0) - b.mean(0)).sum()
    assert frechet_distance(a + shift, b) == pytest.approx(found + moved)


def test_frechet_of_few_images():
    """Spread along one line each, at right angles: no overlap, so the variances add up."""
    a, b = np.zeros((2, 2, 20))
    a[:, 7], b[:, 12] = (-3, 3), (-4, 4)
    assert frechet_distance(a, b) == pytest.approx(18 + 32)
    assert frechet_distance(a, np.zeros((5, 20))) == pytest.approx(18)
    assert frechet_distance(np.ones((2, 20)), np.zeros((3, 20))) == pytest.approx(20)


def test_frechet_of_badly_scaled_features():
    rng = np.random.default_rng(0)
    sigma = np.logspace(-8, 8, 9)
    a = gaussian(rng, 50, np.zeros(9), np.diag(sigma))
    b = gaussian(rng, 50, np.zeros(9), np.diag(sigma * 1.001))
    assert frechet_distance(a, b) == pytest.approx(np.square(0.001 * sigma).sum(), rel=1e-9)
    assert frechet_distance(a[:, ::-1], a[::-1, ::-1]) < 1e-14  # of 1e16


# --------------------------------------------------------------------------- precision and recall


def slow_precision_recall(made, real, k):
    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    def among(points, others):
        radii = [sorted(distance(a, b) for b in others)[k] for a in others]
        inside = [
            any(distance(p, a) <= r + 1e-12 for a, r in zip(others, radii, strict=True))
            for p in points
        ]
        return sum(inside) / len(inside)

    return among(made, real), among(real, made)


@given(n=st.integers(4, 12), m=st.integers(4, 12), d=st.integers(1, 3), seed=st.integers(0, 999))
def test_precision_and_recall_agree_with_the_definition(n, m, d, seed):
    rng = np.random.default_rng(seed)
    made, real = rng.normal(size=(n, d)), rng.normal(0.5, 1.5, size=(m, d))
    found = precision_recall(made, real)
    assert found == pytest.approx(slow_precision_recall(made.tolist(), real.tolist(), 3))
    assert precision_recall(real, made) == pytest.approx(found[::-1])


def test_precision_sees_what_is_far_and_recall_what_is_missing():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(0, 1, (100, 2)), rng.normal(50, 1, (100, 2))])
    assert precision_recall(real, real) == (1, 1)
    one_half = precision_recall(rng.normal(0, 1, (100, 2)), real)
    assert one_half[0] > 0.9 and 0.4 < one_half[1] <= 0.5
    far = precision_recall(rng.normal(-50, 1, (100, 2)), real)
    assert far == (0, 0)


def test_too_few_for_precision():
    with pytest.raises(ValueError, match="expected more than 3 of each, found 3 and 5"):
        precision_recall(np.zeros((3, 2)), np.zeros((5, 2)))


# -------------------------------------------------------------------------------- kernel distance


def slow_kernel_distance(a, b):
    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    within_a, within_b = (mean(kernel(x, y) for x, y in combinations(s, 2)) for s in (a, b))
    return within_a + within_b - 2 * mean(kernel(x, y) for x in a for y in b)


@given(counts, counts, dimensions, seeds)
def test_kernel_distance_agrees_with_the_definition(n, m, d, seed):
    rng = np.random.default_rng(seed)
    a, b = features_of(rng, n, d), features_of(rng, m, d)
    found, scale = kernel_distance(a, b), (np.square(a).sum() + np.square(b).sum() + 1) ** 3
    assert found == pytest.approx(slow_kernel_distance(a.tolist(), b.tolist()), abs=1e-14 * scale)
    assert kernel_distance(b, a) == pytest.approx(found, abs=1e-14 * scale)
    turn = rotation(rng, d)
    turned = kernel_distance(rng.permutation(a) @ turn, rng.permutation(b) @ turn)
    assert turned == pytest.approx(found, abs=1e-14 * scale)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_kernel_distance_is_unbiased(n):
    """Its mean over all ways to split one set in two is 0, however few and unequal the halves."""
    pool = features_of(np.random.default_rng(n), 7, 4)
    splits = [
        kernel_distance(pool[list(chosen)], np.delete(pool, chosen, axis=0))
        for chosen in combinations(range(7), n)
    ]
    assert min(splits) < 0 < max(splits)
    assert np.mean(splits) == pytest.approx(0, abs=1e-12 * max(splits))


def test_kernel_distance_sees_what_frechet_does_not():
    """Sets of one mean and covariance that are skewed to opposite sides."""
    a = np.random.default_rng(0).exponential(size=(300, 1)) - 1
    a -= a.mean()
    assert frechet_distance(a, -a) == pytest.approx(0, abs=1e-20)
    assert kernel_distance(a, -a) > 10


def test_kernel_distance_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = features_of(rng, 23, 4), features_of(rng, 31, 4)
    whole = kernel_distance(a, b)
    for numbers in (1, 100, 300):
        monkeypatch.setattr(statistics, "BLOCK", numbers)
        assert kernel_distance(a, b) == pytest.approx(whole)


# ---------------------------------------------------------------------------------------- nearest


def slow_nearest(queries, images):
    found = []
    for query in queries.astype(int):
        distances = [np.sqrt(np.square(query - p).mean()) for p in images.astype(int)]
        found.append((int(np.argmin(distances)), min(distances)))
    index, distance = zip(*found, strict=True)
    return list(index), list(distance)


blocks = st.sampled_from([1, 30, 400, 2**22])
levels = st.sampled_from([1, 2, 256])  # with few levels many are equal, and the first counts


@given(few, st.integers(1, 20), sides, sides, levels, blocks, seeds)
def test_nearest_agrees_with_the_definition(q, n, h, w, levels, block, seed):
    rng = np.random.default_rng(seed)
    queries, images = (rng.integers(0, levels, (k, h, w, 3), np.uint8) for k in (q, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK", block)
        index, distance = nearest_images(queries, images)
    assert (index.tolist(), distance.tolist()) == slow_nearest(queries, images)


def test_a_copy_is_at_no_distance():
    rng = np.random.default_rng(0)
    images = images_of(rng, 50, 16, 16)
    order = rng.permutation(50)
    index, distance = nearest_images(images[order], images)
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(distance, 0)


def test_one_level_in_one_number_is_seen():
    """|a|² + |b|² − 2ab in float32 takes these images, of |a|² = 8 · 10⁸, for equal."""
    bright = np.full((64, 64, 3), 255, np.uint8)
    images = np.stack([bright] * 4)
    images[(0, 1, 2), 5, 7, 1] -= np.uint8([3, 2, 1])
    index, distance = nearest_images(bright[None], images[:3])
    assert (index[0], distance[0]) == (2, np.sqrt(1 / (64 * 64 * 3)))
    assert nearest_images(bright[None], images)[0] == 3


def test_nearest_unpacks_few_images_at_a_time(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 2**12)
    images = images_of(np.random.default_rng(0), 1000)
    tracemalloc.start()
    nearest_images(images[:100], images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (8 * 2**12) < images.size * 8 / 4


# ----------------------------------------------------------------------------------------- copied


@given(st.sampled_from([20, 40, 100]), seeds)
def test_where_nothing_is_copied_the_share_is_five_per_cent(n, seed):
    """Exactly, over all ways to take one of n distances for a sample's and the rest for real."""
    distances = np.random.default_rng(seed).permutation(n).astype(float)
    shares = [copied(distances[i : i + 1], np.delete(distances, i)) for i in range(n)]
    assert np.mean(shares) == pytest.approx(0.05)


@pytest.mark.parametrize("m", [1, 5, 18])
def test_with_few_real_distances_the_least_is_the_limit(m):
    real = np.arange(m, dtype=float)[::-1] + 1
    assert copied(np.array([0.5, 1, 1.5, 9]), real) == 0.5


@given(st.integers(0, 40), st.integers(0, 40), seeds)
def test_copies_among_new_images_are_counted(copies, new, seed):
    rng = np.random.default_rng(seed)
    real = rng.uniform(1, 2, 50)
    samples = np.concatenate([np.zeros(copies), rng.uniform(2, 3, new), [9.0]])
    found = copied(rng.permutation(samples), real)
    assert found == copies / len(samples)
    assert copied(7 * samples, 7 * real) == found


def test_copies_are_counted_where_real_images_repeat():
    real = np.array([0.0] * 4 + [5.0] * 16)  # a data set with duplicates
    assert copied(np.zeros(10), real) == 1
    assert copied(np.ones(10), real) == 0


def test_from_images_to_the_share_of_copies():
    rng = np.random.default_rng(0)
    training, real, new = (images_of(rng, count) for count in (100, 60, 15))
    _, real_distance = nearest_images(real, training)
    _, distance = nearest_images(np.concatenate([new, training[:45]]), training)
    assert 0.75 <= copied(distance, real_distance) <= 0.85


# ------------------------------------------------------------------------------- malformed arrays

IMAGES, FEATURES = np.zeros((2, 4, 4, 3), np.uint8), np.arange(12.0).reshape(4, 3)
NO_IMAGES = [
    IMAGES.astype(np.float32),
    IMAGES.astype(bool),
    IMAGES[0],
    IMAGES[..., :1],
    IMAGES[:0],
    IMAGES[:, :0],
    np.uint8(3),
]
NO_FEATURES = [
    FEATURES[0],
    FEATURES[:1],
    FEATURES[:0],
    FEATURES[:, :0],
    FEATURES + 0j,
    FEATURES.astype(str),
    np.where(FEATURES == 5, np.nan, FEATURES),
    np.where(FEATURES == 5, -np.inf, FEATURES),
]
NO_DISTANCES = [
    np.zeros(0),
    np.zeros((2, 1)),
    np.float64(1),
    np.array([1, np.nan]),
    np.array([1, np.inf]),
    np.array(["1"]),
]


def short(array):
    return f"{array.dtype}{array.shape}"


@pytest.mark.parametrize("wrong", NO_IMAGES, ids=short)
@pytest.mark.parametrize("function", [psnr, ssim, nearest_images])
def test_what_are_no_images_are_refused(function, wrong):
    for arguments in ((wrong, IMAGES), (IMAGES, wrong)):
        with pytest.raises(ValueError, match=r"^\w+: expected uint8 \(n, h, w, 3\), found .+$"):
            function(*arguments)


@pytest.mark.parametrize("function", [psnr, ssim, nearest_images])
def test_images_of_another_size_are_refused(function):
    with pytest.raises(ValueError, match=r": expected \(.*4, 4, 3\).*, found \(.*4, 2, 3\)$"):
        function(IMAGES, IMAGES[:, :, :2])


@pytest.mark.parametrize("function", [psnr, ssim])
def test_another_number_of_images_is_refused(function):
    with pytest.raises(ValueError, match=r"^truth: expected \(2, .*, found \(1, 4, 4, 3\)$"):
        function(IMAGES, IMAGES[:1])


@pytest.mark.parametrize("wrong", NO_FEATURES, ids=short)
@pytest.mark.parametrize("function", [frechet_distance, kernel_distance])
def test_what_are_no_features_are_refused(function, wrong):
    for arguments in ((wrong, FEATURES), (FEATURES, wrong), (wrong, wrong)):
        with pytest.raises(ValueError, match=r"^[ab]: expected finite .+, found .+$"):
            function(*arguments)


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance])
def test_features_of_another_length_are_refused(function):
    with pytest.raises(ValueError, match=r"^b: .*\(n ≥ 2, 3\), found float64 \(4, 2\)$"):
        function(FEATURES, FEATURES[:, :2])


@pytest.mark.parametrize("wrong", NO_DISTANCES, ids=short)
def test_what_are_no_distances_are_refused(wrong):
    for arguments in ((wrong, np.ones(3)), (np.ones(3), wrong)):
        with pytest.raises(ValueError, match=r"^\w+_distance: expected finite .+, found .+$"):
            copied(*arguments)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8])
def test_features_of_any_kind_of_number(dtype):
    a, b = FEATURES.astype(dtype), FEATURES[::-1].astype(dtype) + dtype(2)
    assert frechet_distance(a, b) == pytest.approx(12)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(FEATURES, FEATURES[::-1] + 2))


def test_arguments_are_only_read():
    images, features = IMAGES.copy(), FEATURES.copy()
    for array in (images, features):
        array.setflags(write=False)
    for function in (psnr, ssim, nearest_images):
        function(images, images)
    for function in (frechet_distance, kernel_distance):
        function(features, features)
    copied(features[0], features[1])
