"""Exercises on layers: gradients that `check_gradients` judges."""

from functools import partial

import numpy as np

from tinyldm.exercises.exercise import Exercise, NotYet, same
from tinyldm.testing import check_gradients
from tinyldm.testing.tensors import tensors_of

NN = "tinyldm.nn"


def _gradients(*shapes, **options):
    """Make the check of a function of arrays of these shapes."""

    def check(f):
        check_gradients(partial(f, **options), tensors_of(*shapes))

    return check


def _slope(f):
    same(f(np.zeros(1)), [0.5], "the slope at 0")
    s = 1 / (1 + np.exp([-1.0, 1.0]))
    same(f(np.array([1.0, -1.0])), s + [1, -1] * s * (1 - s), "the slope at 1 and −1")
    check_gradients(lambda x: (x / (1 + np.exp(-x)), lambda dy: dy * f(x)), tensors_of("n", n=7))


def _softmax(f):
    k, v = tensors_of("1 4 1", "1 4 1")
    y, backward = f(np.ones((1, 1, 1)), k, v, heads=1)
    _, ds, _ = backward(np.ones_like(y))  # with one query of 1, dk is ds
    if abs(ds.sum()) > 1e-9:
        raise NotYet(
            f"ds of a row sums to {ds.sum():.6g}. Raising all scores alike changes nothing: it "
            "must sum to 0"
        )
    p = np.exp(k) / np.exp(k).sum()
    same(ds, p * (v - (p * v).sum()), "ds of a row of scores")
    check_gradients(partial(f, heads=2), tensors_of("2 3 4", "2 5 4", "2 5 4"))


def _normalise(f):
    for axes in ((1,), (0, 2)):
        check_gradients(partial(f, axes=axes, eps=1e-3), tensors_of("3 5 4"))


def _split(f):
    x = np.arange(2 * 3 * 6.0).reshape(2, 3, 6)
    same(f(x, 1), x[:, None], "one head")
    found = np.asarray(f(x, 2))
    if found.shape != (2, 2, 3, 3):
        raise NotYet(f"two heads of (2, 3, 6): expected shape (2, 2, 3, 3), found {found.shape}")
    expected = np.stack([x[:, :, :3], x[:, :, 3:]], axis=1)
    if not np.array_equal(found, expected):
        raise NotYet(
            "two heads of (2, 3, 6): the shape is right, but features and tokens are mixed. The "
            f"first head must hold the features 0, 1, 2 of each token: for the first sample\n"
            f"{expected[0, 0]}, found\n{found[0, 0]}"
        )


def _convolution(f):
    for stride, padding in ((1, 1), (2, (0, 1, 0, 1))):
        options = {"stride": stride, "padding": padding}
        check_gradients(partial(f, **options), tensors_of("2 5 4 3", "3 3 3 2", "2"))


def _embedding(f):
    ids = np.array([[1, 3, 1], [0, 1, 3]])
    (table,) = tensors_of("4 3")

    def look_up(table):
        y, backward = f(ids, table)
        return y, lambda dy: backward(dy)[1]

    check_gradients(look_up, table)


EXERCISES = (
    Exercise(
        "a linear layer, backward",
        "y = x wᵀ + b, with x (..., d_in), w (d_out, d_in), b (d_out,). Given dy, return dx, dw "
        "and "
        "db. dx is there already; dy_rows (rows, d_out) and x_rows (rows, d_in) are dy and x with "
        "all axes but the last made one.",
        f"{NN}.functional", "linear", "backward/return",
        (
            "Write one entry: y[i, o] = Σ_k x[i, k] w[o, k] + b[o]. Which y does w[o, k] move, and "
            "how much?",
            "dw[o, k] = Σ_i dy[i, o] x[i, k]: a matrix product that sums over the rows.",
            "b is added to every row, so db is the sum of dy over the rows. Without b it is None.",
        ),
        _gradients("2 3 4", "5 4", "5"),
    ),
    Exercise(
        "the slope of SiLU",
        "y = x σ(x), with s = σ(x) = 1 / (1 + e⁻ˣ). Return dy/dx. What is it at 0?",
        f"{NN}.activations", "silu_derivative", "return",
        (
            "The product rule has two terms: σ(x), and x times the slope of σ.",
            "The slope of σ is σ (1 − σ).",
        ),
        _slope,
    ),
    Exercise(
        "softmax, backward",
        "p = softmax(scores), of each row. Given dp, write ds, the gradient of the scores (n, "
        "heads, "
        "l, m). Raising one score lowers the share of all others.",
        f"{NN}.attention", "attention", "backward/ds",
        (
            "∂p_j / ∂s_i = p_j (δ_ij − p_i). Multiply by dp_j and sum over j.",
            "ds_i = p_i (dp_i − Σ_j p_j dp_j): the sum is over the last axis, and keeps it.",
        ),
        _softmax,
    ),
    Exercise(
        "queries and keys, backward",
        "scores = q kᵀ, of each head, with q already multiplied by `scale` = 1/√d. Given ds (n, "
        "heads, "
        "l, m), write dq of the q *before* it was scaled, and dk.",
        f"{NN}.attention", "attention", "backward/dq, dk",
        (
            "scores[i, j] = Σ_d q[i, d] k[j, d]. For dq[i, d], sum ds[i, j] k[j, d] over j.",
            "For dk[j, d], sum over i: ds must be transposed.",
            "q here is scale · q: dq takes the factor once more, dk has it in q already.",
        ),
        _gradients("2 3 6", "2 5 6", "2 5 6", heads=2),
    ),
    Exercise(
        "into heads",
        "Split the features of x (n, l, d) into heads: (n, heads, l, d / heads), so that a matrix "
        "product works on each head by itself.",
        f"{NN}.attention", "split_heads", "return",
        (
            "The features of one head lie side by side: split the last axis first.",
            "reshape to (n, l, heads, d // heads), then exchange two axes.",
        ),
        _split,
    ),
    Exercise(
        "mean and variance, backward",
        "x̂ = (x − mean) r, with r = 1 / √(variance + eps). Mean and variance depend on every x, "
        "so the "
        "gradient has three terms. shift = mean(dx̂) and stretch = mean(dx̂ x̂) are there. Return "
        "dx.",
        f"{NN}.norms", "normalise", "backward/return",
        (
            "If mean and variance were constants, dx would be r dx̂. What does moving all x "
            "together "
            "change? Nothing: so the mean of dx must be 0.",
            "Stretching all x about their mean changes nothing either (but for eps): so Σ dx x̂ = "
            "0.",
            "Take from dx̂ its mean, and x̂ times its mean product with x̂; then multiply by r.",
        ),
        _normalise,
    ),
    Exercise(
        "a convolution, backward",
        "Each window of the padded image was multiplied by the kernel. dwindows (n, h', w', kh, "
        "kw, "
        "c_in) is the gradient of the windows. Send each value back to the pixel that it came "
        "from: "
        "for the place (i, j) of the windows those are dpadded[:, ys, xs].",
        f"{NN}.conv", "conv2d", "backward/dpadded[:, ys, xs]",
        (
            "A pixel lies in many windows, at another place (i, j) in each.",
            "So its gradients add up, and at (i, j) they are dwindows[:, :, :, i, j].",
        ),
        _convolution,
    ),
    Exercise(
        "a row that is used twice",
        "y = table[ids]. Given dy, whose rows are `rows` (as many as ids), write the gradient of "
        "the "
        "table into dtable. An id may occur more than once.",
        f"{NN}.functional", "embedding", "backward/xp.add.at",
        (
            "dtable[ids] = rows keeps one of the rows of an id that occurs twice. So does +=.",
            "np.add.at adds up: xp.add.at(array, indices, values). The ids must be flat, as rows "
            "are.",
        ),
        _embedding,
    ),
    Exercise(
        "the divergence from a normal distribution",
        "KL = ½ Σ (mean² + e^logvar − 1 − logvar), divided by n, the size of the batch. Given "
        "dloss, return dmean and "
        "dlogvar.",
        f"{NN}.functional", "kl_to_standard_normal", "backward/return",
        (
            "Of one number: ∂/∂mean ½ mean² = mean.",
            "∂/∂logvar ½ (e^logvar − logvar) = ½ (e^logvar − 1): zero where the variance is 1.",
            "The loss is a mean over the batch: divide by its size, and multiply by dloss.",
        ),
        _gradients("3 2 4", "3 2 4"),
    ),
)  # fmt: skip
