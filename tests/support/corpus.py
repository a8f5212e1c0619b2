"""Right and faulty backward passes, to measure `check_gradients` by.

`python -m tests.support.corpus` prints the table.

Each function is written out as people write it. A fault is a change of its gradients of a kind that
is seen in public code, with the words that the message must say of its cause. The table says how
many were found, and how often the cause was named.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tinyldm.testing import GradientError, check_gradients


@dataclass
class Case:
    """A function `f(*inputs) → (y, gradients(dy) → tuple)`, shapes of its inputs, and faults.

    faults: {what is wrong: (change, cause)}. change(dy, *gradients of dy, *inputs) → gradients.
    """

    f: Callable
    shapes: dict[str, tuple[int, ...]]
    faults: dict[str, tuple[Callable, str]] = field(default_factory=dict)
    make: Callable | None = None  # of the inputs, from a generator and shapes


CASES: dict[str, Case] = {}


def case(faults=None, make=None, **shapes):
    """Enter a function into the corpus."""

    def enter(f):
        CASES[f.__name__] = Case(f, shapes, faults or {}, make)
        return f

    return enter


def inputs_of(case: Case, seed: int) -> list[np.ndarray]:
    """Draw the inputs of a case."""
    rng = np.random.default_rng(seed)
    if case.make:
        return case.make(rng, case.shapes)
    return [rng.normal(0.3, 1, shape) for shape in case.shapes.values()]


def with_fault(case: Case, what: str) -> Callable:
    """Return the function of a case with one of its faults in the backward pass."""
    change = case.faults[what][0]

    @functools.wraps(case.f)
    def faulty(*inputs):
        y, gradients = case.f(*inputs)

        def backward(dy):
            given = gradients(dy)
            given = given if isinstance(given, tuple) else (given,)
            changed = change(dy, *given, *inputs)
            return changed

        return y, backward

    return faulty


def positive(rng, shapes):
    return [rng.uniform(0.5, 2, shape) for shape in shapes.values()]


# ------------------------------------------------------------------------------------ elementwise


@case(
    {
        "the factor 2 is lost": (lambda dy, dx, x: dx / 2, "multiplied by ½"),
        "x is lost": (lambda dy, dx, x: 2 * dy, "own derivative is missing"),
    },
    x=(3, 4),
)
def square(x):
    return x * x, lambda dy: 2 * x * dy


@case(
    {
        "sign": (lambda dy, dx, x: -dx, "−1"),
        "dy is lost": (lambda dy, dx, x: dx / dy, "divided by dy"),
    },
    x=(4,),
)
def exponential(x):
    y = np.exp(x)
    return y, lambda dy: y * dy


@case({"of the input, not of the result": (lambda dy, dx, x: dy * (1 - x * x), "")}, x=(2, 5))
def tanh(x):
    y = np.tanh(x)
    return y, lambda dy: dy * (1 - y * y)


@case(
    {
        "the mask is forgotten": (lambda dy, dx, x: dy, "it is dy itself"),
        "the mask is inverted": (lambda dy, dx, x: dy * (x < 0), "mask is inverted"),
    },
    x=(5, 4),
)
def relu(x):
    return np.maximum(x, 0), lambda dy: dy * (x > 0)


@case(
    {"the second term is lost": (lambda dy, dx, x: dy / (1 + np.exp(-x)), "term is missing")},
    x=(3, 3),
)
def silu(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, lambda dy: dy * s * (1 + x * (1 - s))


@case(
    {"of the logarithm to base 10": (lambda dy, dx, x: dx / np.log(10), "multiplied by 0.434")},
    positive,
    x=(4, 2),
)
def logarithm(x):
    return np.log(x), lambda dy: dy / x


@case({"the factor ½ is lost": (lambda dy, dx, x: 2 * dx, "multiplied by 2")}, positive, x=(6,))
def square_root(x):
    y = np.sqrt(x)
    return y, lambda dy: dy / (2 * y)


@case({"passes where it was clipped": (lambda dy, dx, x: dy, "it is dy itself")}, x=(4, 5))
def clip(x):
    return np.clip(x, -0.5, 0.5), lambda dy: dy * ((x > -0.5) & (x < 0.5))


@case({"the sign is lost": (lambda dy, dx, x: dy, "it is dy itself")}, x=(3, 4))
def absolute(x):
    return np.abs(x), lambda dy: dy * np.sign(x)


@case({"leaks nothing": (lambda dy, dx, x: dy * (x > 0), "zero in")}, x=(4, 4))
def leaky_relu(x):
    return np.where(x > 0, x, 0.1 * x), lambda dy: dy * np.where(x > 0, 1, 0.1)


@case(
    {
        "the gradients are exchanged": (lambda dy, dx, dz, x, z: (dz, dx), "exchanged"),
        "of one the sign": (lambda dy, dx, dz, x, z: (dx, -dz), "−1"),
    },
    x=(3, 2),
    z=(3, 2),
)
def product(x, z):
    return x * z, lambda dy: (dy * z, dy * x)


@case(
    {
        "the sign of the divisor": (lambda dy, dx, dz, x, z: (dx, -dz), "−1"),
        "the divisor is not squared": (lambda dy, dx, dz, x, z: (dx, dz * z), "multiplied by z"),
    },
    positive,
    x=(2, 3),
    z=(2, 3),
)
def quotient(x, z):
    return x / z, lambda dy: (dy / z, -dy * x / z**2)


@case(
    {"nothing for the second": (lambda dy, dx, dz, x, z: (dx, 0 * dz), "zero everywhere")},
    x=(3, 3),
    z=(3, 3),
)
def difference(x, z):
    return x - z, lambda dy: (dy, -dy)


@case(
    {"all go to the first": (lambda dy, dx, dz, x, z: (dy, 0 * dz), "it is dy itself")},
    x=(3, 4),
    z=(3, 4),
)
def maximum(x, z):
    return np.maximum(x, z), lambda dy: (dy * (x > z), dy * (z > x))


# -------------------------------------------------------------------------------------- reductions


@case(
    {
        "a mean over the batch, too": (lambda dy, dx, x: dx / len(x), "a sum became a mean"),
        "not broadcast back": (lambda dy, dx, x: np.eye(*x.shape) * dx, "zero in"),
    },
    x=(5, 4),
)
def sum_over_rows(x):
    return x.sum(0), lambda dy: np.broadcast_to(dy, x.shape).copy()


@case(
    {
        "the size is forgotten": (lambda dy, dx, x: dx * x.shape[1], "mean is missing"),
        "divided twice": (lambda dy, dx, x: dx / x.shape[1], "taken twice"),
    },
    x=(3, 7),
)
def mean_over_columns(x):
    return x.mean(1), lambda dy: np.repeat(dy[:, None], x.shape[1], 1) / x.shape[1]


@case(
    {
        "the mean is not subtracted": (
            lambda dy, dx, x: 2 * x * dy[:, None] / x.shape[1],
            "constant along axis 1",
        )
    },
    x=(3, 4),
)
def variance(x):
    mean = x.mean(1, keepdims=True)
    return ((x - mean) ** 2).mean(1), lambda dy: 2 * (x - mean) * dy[:, None] / x.shape[1]


@case(
    {"the other factors are lost": (lambda dy, dx, x: dy[:, None] + 0 * x, "")}, positive, x=(3, 4)
)
def product_of_rows(x):
    y = x.prod(1)
    return y, lambda dy: (dy * y)[:, None] / x


@case(
    {
        "all entries get it": (
            lambda dy, dx, x: np.repeat(dy[:, None], x.shape[1], 1),
            "mask is forgotten",
        )
    },
    x=(4, 5),
)
def largest(x):
    at = x.argmax(1)

    def gradients(dy):
        dx = np.zeros_like(x)
        dx[np.arange(len(x)), at] = dy
        return dx

    return x[np.arange(len(x)), at], gradients


@case({"from the front": (lambda dy, dx, x: np.cumsum(dy, 1), "it is J dy")}, x=(2, 6))
def cumulative_sum(x):
    return np.cumsum(x, 1), lambda dy: np.flip(np.cumsum(np.flip(dy, 1), 1), 1)


@case(
    {
        "the norm's own gradient is lost": (
            lambda dy, dx, x: dy / np.sqrt((x * x).sum(1, keepdims=True)),
            "wrong factor: x",
        )
    },
    x=(3, 4),
)
def unit_length(x):
    n = np.sqrt((x * x).sum(1, keepdims=True))
    y = x / n
    return y, lambda dy: (dy - y * (dy * y).sum(1, keepdims=True)) / n


# ------------------------------------------------------------------------- matrices and movement


@case(
    {
        "weight twice": (lambda dy, dx, dw, db, x, w, b: (dx, 2 * dw, db), "multiplied by 2"),
        "bias by a mean": (
            lambda dy, dx, dw, db, x, w, b: (dx, dw, db / len(x)),
            "sum became a mean",
        ),
        "weight by a mean": (
            lambda dy, dx, dw, db, x, w, b: (dx, dw / len(x), db),
            "sum became a mean",
        ),
        "weight transposed": (lambda dy, dx, dw, db, x, w, b: (dx, dw.T.copy(), db), "transposed"),
        "bias of the last sample": (
            lambda dy, dx, dw, db, x, w, b: (dx, dw, dy[-1]),
            "single values of dy",
        ),
        "the input is forgotten": (
            lambda dy, dx, dw, db, x, w, b: (0 * dx, dw, db),
            "zero everywhere",
        ),
        "bias not summed": (lambda dy, dx, dw, db, x, w, b: (dx, dw, dy), "sum its gradient"),
    },
    x=(5, 4),
    w=(4, 4),
    b=(4,),
)
def linear(x, w, b):
    return x @ w + b, lambda dy: (dy @ w.T, x.T @ dy, dy.sum(0))


@case({"only one factor": (lambda dy, dx, x: dy @ x.T, "term is missing")}, x=(4, 4))
def matrix_squared(x):
    return x @ x, lambda dy: dy @ x.T + x.T @ dy


@case(
    {
        "the weight of the last use alone": (
            lambda dy, dx, dw, x, w: (dx, (x @ w).T @ dy),
            "term is missing",
        )
    },
    x=(3, 4),
    w=(4, 4),
)
def tied_weights(x, w):
    h = x @ w
    return h @ w, lambda dy: (dy @ w.T @ w.T, h.T @ dy + x.T @ (dy @ w.T))


@case(
    {"not transposed back": (lambda dy, dx, x: dx.reshape(-1).reshape(4, 3).T.copy(), "order")},
    x=(3, 4),
)
def transposed(x):
    return x.T.copy(), lambda dy: dy.T.copy()


@case({"flipped along the wrong axis": (lambda dy, dx, x: np.flip(dy, 0), "flipped")}, x=(4, 5))
def flipped(x):
    return x[:, ::-1].copy(), lambda dy: dy[:, ::-1].copy()


@case({"rolled the wrong way": (lambda dy, dx, x: np.roll(dy, 1, 1), "in another order")}, x=(2, 7))
def rolled(x):
    return np.roll(x, 1, 1), lambda dy: np.roll(dy, -1, 1)


@case(
    {"off by one": (lambda dy, dx, x: np.pad(dy, ((0, 0), (1, 2)))[:, : x.shape[1]], "shifted")},
    x=(3, 8),
)
def cut_out(x):
    return x[:, 2:7].copy(), lambda dy: np.pad(dy, ((0, 0), (2, 1)))


@case(
    {"repeated rows are not summed": (lambda dy, dx, x: assigned(dy, x), "not assigned")}, x=(4, 3)
)
def embedding(x):
    ids = np.array([1, 0, 1, 3, 1])

    def gradients(dy):
        dx = np.zeros_like(x)
        np.add.at(dx, ids, dy)
        return dx

    return x[ids], gradients


def assigned(dy, x):
    """The fault of many embeddings: `dx[ids] = dy` keeps the last of equal ids alone."""
    dx = np.zeros_like(x)
    dx[np.array([1, 0, 1, 3, 1])] = dy
    return dx


@case(
    {
        "the ends exchanged": (
            lambda dy, dx, dz, x, z: (dy[:, -x.shape[1] :].copy(), dy[:, : z.shape[1]].copy()),
            "exchanged",
        )
    },
    x=(2, 3),
    z=(2, 3),
)
def joined(x, z):
    return np.concatenate([x, z], 1), lambda dy: (dy[:, :3].copy(), dy[:, 3:].copy())


@case(
    {
        "the copies are not summed": (lambda dy, dx, x: dy[:, ::2].copy(), "not assigned"),
        "their mean": (lambda dy, dx, x: dx / 2, "multiplied by ½"),
    },
    x=(3, 4),
)
def upsampled(x):
    return np.repeat(x, 2, 1), lambda dy: dy.reshape(3, 4, 2).sum(2)


@case({"not divided": (lambda dy, dx, x: 2 * dx, "multiplied by 2")}, x=(3, 8))
def averaged_in_pairs(x):
    return x.reshape(3, 4, 2).mean(2), lambda dy: np.repeat(dy, 2, 1) / 2


@case(
    {"added in the wrong order": (lambda dy, dx, x: dy.reshape(x.shape[::-1]).T.copy(), "order")},
    x=(3, 4),
)
def reshaped(x):
    return x.reshape(2, 6), lambda dy: dy.reshape(3, 4)


@case(
    {"of the inverse's transpose": (lambda dy, dx, x: dx.T.copy(), "transposed")},
    lambda rng, shapes: [rng.normal(size=(3, 3)) + 3 * np.eye(3)],
    x=(3, 3),
)
def inverse(x):
    y = np.linalg.inv(x)
    return y, lambda dy: -y.T @ dy @ y.T


# ------------------------------------------------------------------------------------------ losses


@case(
    {
        "summed, not averaged": (lambda dy, dx, x: dx * x.size, "mean is missing"),
        "the factor 2 is lost": (lambda dy, dx, x: dx / 2, "½"),
    },
    x=(3, 4),
)
def squared_error(x):
    d = x - np.linspace(0, 1, 12).reshape(3, 4)
    return (d * d).mean(), lambda dy: 2 * dy * d / d.size


@case(
    {
        "the batch's mean twice": (lambda dy, dx, x: dx / len(x), "taken twice"),
        "the target is not subtracted": (
            lambda dy, dx, x: dx + np.eye(*x.shape) * dy / len(x),
            "index or target",
        ),
    },
    x=(5, 5),
)
def cross_entropy(x):
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = -np.log(np.diag(p)).mean()
    return y, lambda dy: dy * (p - np.eye(*x.shape)) / len(x)


@case(
    {
        "the variance's sign": (lambda dy, dm, dv, m, v: (dm, -dv), "−1"),
        "½ on the mean": (lambda dy, dm, dv, m, v: (dm / 2, dv), "½"),
    },
    m=(3, 2),
    v=(3, 2),
)
def gaussian_kl(m, v):
    y = 0.5 * (m * m + np.exp(v) - 1 - v).sum()
    return y, lambda dy: (dy * m, dy * 0.5 * (np.exp(v) - 1))


@case(
    {"the margin is forgotten": (lambda dy, dx, x: -dy / x.size + 0 * x, "mask is forgotten")},
    x=(4, 5),
)
def hinge(x):
    return np.maximum(0, 1 - x).mean(), lambda dy: -dy * (x < 1) / x.size


@case({"not clipped": (lambda dy, dx, x: dy * x, "multiplied by |x|")}, x=(4, 4))
def huber(x):
    small = np.abs(x) < 1
    return np.where(
        small, 0.5 * x * x, np.abs(x) - 0.5
    ), lambda dy: dy * np.where(small, x, np.sign(x))


# --------------------------------------------------------------------------- softmax, norms, layers


@case(
    {
        "without the sum": (lambda dy, dx, x: dy * soft(x), "term is missing"),
        "the diagonal alone": (
            lambda dy, dx, x: dy * soft(x) * (1 - soft(x)),
            "diagonal of the Jacobian",
        ),
    },
    x=(3, 5),
)
def softmax(x):
    p = soft(x)
    return p, lambda dy: p * (dy - (p * dy).sum(-1, keepdims=True))


def soft(x):
    e = np.exp(x - x.real.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@case({"the sum is not scaled": (lambda dy, dx, x: dy - dy.sum(1, keepdims=True), "")}, x=(2, 4))
def log_softmax(x):
    p = soft(x)
    return np.log(p), lambda dy: dy - p * dy.sum(1, keepdims=True)


def _normalised(x, axis):
    mean = x.mean(axis, keepdims=True)
    deviation = np.sqrt(((x - mean) ** 2).mean(axis, keepdims=True) + 1e-5)
    return (x - mean) / deviation, deviation


def _norm(x, axis):
    y, deviation = _normalised(x, axis)

    def gradients(dy):
        along = (dy * y).mean(axis, keepdims=True)
        return (dy - dy.mean(axis, keepdims=True) - y * along) / deviation

    return y, gradients


@case(
    {
        "without its second term": (
            lambda dy, dx, x: (dy - dy.mean(1, keepdims=True)) / _normalised(x, 1)[1],
            "term is missing",
        ),
        "without that of the mean": (
            lambda dy, dx, x: dx + dy.mean(1, keepdims=True) / _normalised(x, 1)[1],
            "constant along axis 1",
        ),
        "not divided": (
            lambda dy, dx, x: dx * _normalised(x, 1)[1],
            "constant along axis 1: a division",
        ),
    },
    x=(3, 6),
)
def layer_norm(x):
    return _norm(x, 1)


@case(
    {
        "as if the statistics were constants": (
            lambda dy, dx, x: dy / _normalised(x, 0)[1],
            "two terms along",
        ),
        "without that of the mean": (
            lambda dy, dx, x: dx + dy.mean(0, keepdims=True) / _normalised(x, 0)[1],
            "constant along axis 0",
        ),
    },
    x=(6, 3),
)
def batch_norm(x):
    return _norm(x, 0)


@case(
    {
        "the gain is not summed": (lambda dy, dx, dg, x, g: (dx, dy * x), "sum its gradient"),
        "the gain of one sample": (lambda dy, dx, dg, x, g: (dx, (dy * x)[0]), "not assigned"),
        "the gain twice": (lambda dy, dx, dg, x, g: (dx * g, dg), "constant along axis 0"),
    },
    x=(3, 4),
    g=(4,),
)
def gain(x, g):
    return x * g, lambda dy: (dy * g, (dy * x).sum(0))


@case(
    {
        "the scale is forgotten": (
            lambda dy, dq, dk, dv, q, k, v: (2 * dq, 2 * dk, dv),
            "multiplied by 2",
        ),
        "k not transposed": (lambda dy, dq, dk, dv, q, k, v: (dq, dq, dv), ""),
        "v of the scores": (lambda dy, dq, dk, dv, q, k, v: (dq, dk, soft(q @ k.T / 2) @ dy), ""),
        "q and k exchanged": (lambda dy, dq, dk, dv, q, k, v: (dk, dq, dv), "exchanged"),
        "softmax by its diagonal": (
            lambda dy, dq, dk, dv, q, k, v: (diagonal(dy, q, k, v) @ k / 2, dk, dv),
            "",
        ),
    },
    q=(3, 4),
    k=(3, 4),
    v=(3, 4),
)
def attention(q, k, v):
    p = soft(q @ k.T / 2)

    def gradients(dy):
        dp = dy @ v.T
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / 2
        return ds @ k, ds.T @ q, p.T @ dy

    return p @ v, gradients


def diagonal(dy, q, k, v):
    p = soft(q @ k.T / 2)
    return (dy @ v.T) * p * (1 - p)


def windows(x, n):
    return np.stack([x[:, i : i + n] for i in range(x.shape[1] - n + 1)], 1)


@case(
    {
        "kernel flipped": (lambda dy, dx, dw, x, w: (dx, dw[::-1].copy()), "flipped"),
        "padding off by one": (lambda dy, dx, dw, x, w: (np.roll(dx, 1, 1), dw), "shifted"),
        "the border is lost": (lambda dy, dx, dw, x, w: (bordered(dx), dw), "borders of axis 1"),
        "kernel by the batch's mean": (
            lambda dy, dx, dw, x, w: (dx, dw / len(x)),
            "sum became a mean",
        ),
        "correlation in place of convolution": (
            lambda dy, dx, dw, x, w: (correlated(dy, w), dw),
            "it is J dy",
        ),
    },
    x=(4, 9),
    w=(3,),
)
def convolution(x, w):
    padded = np.pad(x, ((0, 0), (1, 1)))

    def gradients(dy):
        outer = np.pad(dy, ((0, 0), (1, 1)))
        return windows(outer, 3) @ w[::-1], np.einsum("nl,nlk->k", dy, windows(padded, 3))

    return windows(padded, 3) @ w, gradients


def bordered(dx):
    dx = dx.copy()
    dx[:, [0, -1]] *= 0.5
    return dx


def correlated(dy, w):
    return windows(np.pad(dy, ((0, 0), (1, 1))), 3) @ w


@case(
    {
        "the mask is drawn anew": (
            lambda dy, dx, x: dy * (np.random.default_rng(1).random(x.shape) < 0.5) * 2,
            "another mask",
        ),
        "not scaled up": (lambda dy, dx, x: dx / 2, "½"),
    },
    x=(4, 6),
)
def dropout(x):
    mask = 2 * (np.random.default_rng(0).random(x.shape) < 0.5)
    return x * mask, lambda dy: dy * mask


@case(
    {
        "the state is not passed on": (
            lambda dy, dx, dw, x, w: (dx, last_step(dy, x, w)),
            "term is missing",
        )
    },
    x=(3, 2),
    w=(2, 2),
)
def two_steps_of_a_recurrence(x, w):
    h = np.tanh(x @ w)
    y = np.tanh((h + x) @ w)

    def gradients(dy):
        da = dy * (1 - y * y)
        dh = da @ w.T
        db = dh * (1 - h * h)
        return dh + db @ w.T, (h + x).T @ da + x.T @ db

    return y, gradients


def last_step(dy, x, w):
    h = np.tanh(x @ w)
    y = np.tanh((h + x) @ w)
    return (h + x).T @ (dy * (1 - y * y))


@case(
    {
        "the residual is lost": (lambda dy, dx, x: dx - dy, "wrong factor: dy"),
        "the branch is lost": (lambda dy, dx, x: dy, "it is dy itself"),
    },
    x=(3, 4),
)
def residual(x):
    return x + np.sin(x), lambda dy: dy + dy * np.cos(x)


@case(
    {
        "one half alone": (
            lambda dy, dx, x: np.concatenate([0 * dx[:, :3], dx[:, 3:]], 1),
            "zero at",
        )
    },
    x=(4, 6),
)
def gated(x):
    a, b = x[:, :3], x[:, 3:]
    s = 1 / (1 + np.exp(-b))
    return a * s, lambda dy: np.concatenate([dy * s, dy * a * s * (1 - s)], 1)


# Right functions of the kinds that checkers stumble over: no imaginary parts, kinks, constants.


@case(x=(3, 4))
def deviation_by_numpy(x):
    s = x.std()
    return s, lambda dy: dy * (x - x.mean()) / (x.size * s)


@case(x=(5,))
def length_by_numpy(x):
    n = np.linalg.norm(x)
    return n, lambda dy: dy * x / n


@case(x=(4, 3))
def variance_by_numpy(x):
    return x.var(0), lambda dy: 2 * dy * (x - x.mean(0)) / len(x)


@case(x=(3, 4))
def signed_square(x):
    return x * np.abs(x), lambda dy: 2 * dy * np.abs(x)


@case(x=(4, 4))
def masked_with_infinity(x):
    mask = np.tri(4, dtype=bool)
    return np.where(mask, 3 * x, -np.inf), lambda dy: np.where(mask, 3 * dy, 0)


@case(x=(3, 4))
def masked_with_a_large_number(x):
    mask = np.arange(4) > 1
    return np.where(mask, x, -1e15), lambda dy: np.where(mask, dy, 0)


@case(x=(3, 4))
def sum_of_softmax(x):
    p = soft(x)

    def gradients(dy):
        dp = np.broadcast_to(dy[:, None], p.shape)
        return p * (dp - (p * dp).sum(1, keepdims=True))

    return p.sum(1), gradients


@case(x=(3, 4))
def constant(x):
    return np.ones(3), lambda dy: np.zeros_like(x)


@case(x=(0, 3))
def of_nothing(x):
    return 2 * x, lambda dy: 2 * dy


@case(x=())
def of_a_number(x):
    return x * x, lambda dy: 2 * dy * x


@case(x=(5,), z=(5,))
def of_very_different_sizes(x, z):
    return 1e12 * x + 1e-2 * z, lambda dy: (1e12 * dy, 1e-2 * dy)


@case(x=(6,))
def relu_at_its_kink(x):
    x = x - x  # zero everywhere
    return np.maximum(x, 0), lambda dy: 0 * dy


@case(x=(3, 3))
def floor_and_rest(x):
    return x - np.floor(x.real), lambda dy: dy.copy()


@case(positive and None, positive, x=(3, 4))
def cube_root(x):
    y = np.cbrt(x)
    return y, lambda dy: dy / (3 * y * y)


@case(x=(4, 5))
def sorted_rows(x):
    at = np.argsort(x, 1)

    def gradients(dy):
        dx = np.zeros_like(x)
        np.put_along_axis(dx, at, dy, 1)
        return dx

    return np.take_along_axis(x, at, 1), gradients


@case(x=(3, 4))
def softplus(x):
    return np.logaddexp(0, x), lambda dy: dy / (1 + np.exp(-x))


@case(x=(3,), z=(3,))
def angle(x, z):
    r = x * x + z * z
    return np.arctan2(x, z), lambda dy: (dy * z / r, -dy * x / r)


@case(x=(4, 4))
def frobenius_norm(x):
    n = np.sqrt((x * x).sum())
    return n, lambda dy: dy * x / n


@case(x=(3, 5))
def log_sum_exp(x):
    m = x.max()
    return m + np.log(np.exp(x - m).sum()), lambda dy: dy * soft(x.reshape(-1)).reshape(x.shape)


@case(x=(4, 4))
def triangle(x):
    return np.tril(x), lambda dy: np.tril(dy)


@dataclass
class Row:
    """Result of the check of one function, right or with a fault."""

    name: str
    fault: str  # "" for the right function
    message: str  # "" where it passed
    as_expected: bool
    named: bool  # the cause, as the corpus says it


def measure(seed: int = 0) -> list[Row]:
    """Check all functions, right and faulty."""
    rows = []
    for name, one in CASES.items():
        for what in ["", *one.faults]:
            f = with_fault(one, what) if what else one.f
            try:
                check_gradients(f, inputs_of(one, seed), rng=seed)
                message = ""
            except GradientError as error:
                message = " ".join(str(error).split())
            cause = one.faults[what][1] if what else ""
            named = bool(cause) and cause in message
            rows.append(Row(name, what, message, bool(message) == bool(what), named))
    return rows


def main() -> None:
    """Print the table."""
    rows = measure()
    for row in rows:
        if row.fault or not row.as_expected:
            found = "found" if row.as_expected else "MISSED" if row.fault else "REFUSED"
            cause = row.message.partition("cause: ")[2].partition(" right:")[0]
            print(f"{found:8}{'named' if row.named else '':6}{row.name}: {row.fault} | {cause}")
    faulty = [row for row in rows if row.fault]
    right = [row for row in rows if not row.fault]
    print(
        f"{len(right)} right, {sum(not row.as_expected for row in right)} of them refused\n"
        f"{len(faulty)} faulty, {sum(row.as_expected for row in faulty)} found, "
        f"cause named in {sum(row.named for row in faulty)}"
    )


if __name__ == "__main__":
    main()
