"""Exercises on training, and on what the networks stand on."""

import numpy as np

from tinyldm.exercises.exercise import Exercise, NotYet, same
from tinyldm.nn.optim import adam_state, ema_decay
from tinyldm.testing.tensors import tensors_of

RATE = 0.01


def _state(w):
    params = {"w": w.copy()}
    return params, adam_state(params), {"w": w.copy()}


def _first_step(f):
    w, g = tensors_of("5", "5")
    for step in (0, 3):
        params, state, average = _state(w)
        for k in range(step + 1):
            f(params, {"w": g}, state, average, k, RATE, decay=0.0)
        what = f"after {step + 1} steps with the same gradient, each of size lr, the way of w"
        same((params["w"] - w) / RATE, -(step + 1) * np.sign(g), what, tol=1e-6)


def _average(f):
    w, g = tensors_of("4", "4")
    params, state, average = _state(w)
    average["w"] += 1.0
    f(params, {"w": g}, state, average, 10**6, RATE, ema=0.75)
    now, then = average["w"], w + 1.0
    same(now, 0.75 * then + 0.25 * params["w"], "decay 0.75: the average after a step")
    params, state, average = _state(w)
    f(params, {"w": g}, state, average, 0, RATE, ema=0.75)
    d = ema_decay(0, 0.75)
    same(average["w"], d * w + (1 - d) * params["w"], f"decay {d:g} at first: the average")


def _orthogonal(f):
    for shape in ("4 6", "6 4"):
        (g,) = tensors_of(shape)
        x = np.asarray(f(g))
        if x.shape != g.shape:
            raise NotYet(f"expected the shape of the gradient, {g.shape}, found {x.shape}")
        sizes = np.linalg.svd(x, compute_uv=False)
        if not ((sizes > 0.6) & (sizes < 1.3)).all():
            raise NotYet(f"the singular values of the result are {sizes.round(2)}, not about 1")
        u, _, v = np.linalg.svd(g, full_matrices=False)
        turned = u.T @ x @ v.T
        if abs(turned - np.diag(np.diag(turned))).max() > 1e-6:
            raise NotYet("the singular values are about 1, but the singular vectors are others")


def _winograd(f):
    for m in (2, 4):
        matrices = {name: np.asarray(f(name, m, np, "d")) for name in ("input", "kernel", "output")}
        image, kernel = tensors_of(f"{m + 2} {m + 2}", "3 3")
        product = (matrices["input"] @ image.reshape(-1)) * (
            matrices["kernel"] @ kernel.reshape(-1)
        )
        windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3))
        expected = (windows * kernel).sum((2, 3))
        found = (matrices["output"] @ product).reshape(m, m)
        same(found, expected, f"a tile of {m}×{m} outputs")


def _merge(f):
    ranks = {("a", "b"): 1, ("ab", "c"): 0, ("c", "a"): 3, ("b", "a"): 2}
    for text, expected in (
        ("x", ["x"]),
        ("abc", ["abc"]),
        ("aab", ["a", "ab"]),
        ("abab", ["ab", "ab"]),
        ("bab", ["b", "ab"]),
        ("abcab", ["abc", "ab"]),
        ("caba", ["c", "ab", "a"]),
    ):
        found = f(list(text), ranks)
        if found != expected:
            raise NotYet(f"{text!r} with {ranks}: expected {expected}, found {found}")


EXERCISES = (
    Exercise(
        "AdamW's first steps",
        "m and v begin at zero, so at first both are too small: after step 0 (the first), m is "
        "only "
        "1 − β₁ of a gradient. Write m_hat and v_hat, which are corrected for it.",
        "tinyldm.nn.optim", "adamw", "m_hat, v_hat",
        (
            "With the same g in each step, m after n steps is (1 − β₁ⁿ) g. How many steps are "
            "made?",
            "step counts from 0: n = step + 1. v has β₂.",
        ),
        _first_step,
    ),
    Exercise(
        "the moving average",
        "Images are made with an average of the weights over the last steps. Let it keep "
        "d = ema_decay(step, ema) of itself, and take the rest from w.",
        "tinyldm.nn.optim", "adamw", "average[name]",
        (
            "d · average + (1 − d) · w, written as something that is added to the average.",
            "(1 − d) (w − average): where both are equal, nothing changes, not even by rounding.",
        ),
        _average,
    ),
    Exercise(
        "singular values near 1",
        "Muon's step: x has singular values in 0…1. Write one round, x ← a x + (b S + c S²) x with "
        "S = x xᵀ, which is `square`: it moves a singular value s to a s + b s³ + c s⁵.",
        "tinyldm.nn.optim", "orthogonalise", "x",
        (
            "S² is a matrix product: square @ square.",
            "The polynomial in S is a matrix, too; it multiplies x from the left.",
        ),
        _orthogonal,
        which=1,
    ),
    Exercise(
        "Winograd's transforms",
        "A convolution is a product of polynomials: evaluate both at points, multiply the values, "
        "and "
        "interpolate. values(n) has 1, z, z², … (n of them) at each point. For m outputs of a "
        "kernel "
        "of 3, give a (values of the outputs), g (of the kernel), b_t (of the input).",
        "tinyldm.kernels.cpu.winograd", "_transform_matrix", "a, g, b_t",
        (
            "a has m columns and g three: values(m), values(3).",
            "m + 2 inputs. The transposed algorithm (Lavin & Gray 2016) needs the interpolation, "
            "the "
            "inverse of values(m + 2), transposed.",
        ),
        _winograd,
    ),
    Exercise(
        "pairs of bytes",
        "A word is cut into symbols. The pair that was learned first is joined first. The heap "
        "gives "
        "its left place i; j is the place of the right one. Join them: the new symbol stands at "
        "i, and "
        "None at j.",
        "tinyldm.data.byte_pairs", "merge", "symbols[i], symbols[j]",
        ("Symbols are texts: + joins them.",),
        _merge,
    ),
)  # fmt: skip
