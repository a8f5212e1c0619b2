"""The exercises: the source's own line passes, the blank does not, typical mistakes are named."""

import re
import textwrap

import pytest

from tinyldm.exercises import EXERCISES, NotYet, check

NUMBERS = range(1, len(EXERCISES) + 1)
EXERCISE = dict(zip(NUMBERS, EXERCISES, strict=True))
MISTAKES = {  # number → [(what was written, what the message says of it)]
    1: [
        ("return dx, dy_rows.T @ x_rows, dy_rows.mean(axis=0)", "b: .*multiplied by 1/6"),
        ("return dx, x_rows.T @ dy_rows, dy_rows.sum(axis=0)", "w: .*shape .4, 5.*expected .5, 4"),
        ("return dx, 2 * dy_rows.T @ x_rows, dy_rows.sum(axis=0)", "w: .*by 2.*right: x, b"),
    ],
    2: [
        ("return s * (1 - s)", "slope at 0: expected 0.5, found 0.25"),
        ("return s", "slope at 1 and −1: expected"),
        ("return s * (1 - x * (1 - s))", "slope at 1 and −1: expected"),
    ],
    3: [
        ("ds = p * dp", "must sum to 0"),
        ("ds = p * (dp - (p * dp).mean(axis=3, keepdims=True))", "must sum to 0"),
        ("ds = p * (1 - p) * dp", "must sum to 0"),
    ],
    4: [
        ("dq, dk = ds @ k, ds.swapaxes(2, 3) @ q", "q: .*multiplied by 1.73205 .*right: k, v"),
        ("dq, dk = ds @ k * scale, ds.swapaxes(2, 3) @ q * scale", "k: .*right: q, v"),
        ("dq, dk = ds @ k * scale, ds @ q", r"line \d+: ValueError"),
    ],
    5: [
        ("return x.reshape(n, heads, l, d // heads)", "features and tokens are mixed"),
        ("return x.reshape(n, l, heads, d // heads)", "expected shape .*1, 3, 6"),
        ("return x.reshape(n, l, d // heads, heads).transpose(0, 3, 1, 2)", "tokens are mixed"),
    ],
    6: [
        ("return r * (dx_hat - shift)", "term is missing .* times a number for each"),
        ("return r * (dx_hat - x_hat * stretch)", "constant along axis 1"),
        ("return dx_hat - shift - x_hat * stretch", "by a number that is constant along"),
    ],
    7: [
        ("dpadded[:, ys, xs] = dwindows[:, :, :, i, j]", "x: wrong gradient"),
        ("dpadded[:, ys, xs] += dwindows[:, :, :, j, i]", "x: wrong gradient"),
        ("dpadded[:, ys, xs] -= dwindows[:, :, :, i, j]", "multiplied by −1 .its sign"),
    ],
    8: [
        ("dtable[ids.reshape(-1)] = rows", "single values of dy: they must be added up"),
        ("dtable[ids.reshape(-1)] += rows", "single values of dy: they must be added up"),
        ("xp.add.at(dtable, ids.reshape(-1), rows / len(rows))", "multiplied by 1/6"),
    ],
    9: [
        ("return mean * (dloss / n), variance * (0.5 * dloss / n)", "logvar: .*constant along"),
        ("return mean * dloss, (variance - 1) * (0.5 * dloss)", "by 3, and 3 is the size"),
        ("return 2 * mean * (dloss / n), (variance - 1) * (0.5 * dloss / n)", "mean: .*by 2"),
    ],
    10: [
        ("return a * x0 + (1 - a) * noise", "black image, x_t"),
        ("return s * x0 + a * noise", "without noise, x_t"),
        ("return a * a * x0 + s * noise", "without noise, x_t"),
    ],
    11: [
        ("return a * x + s * prediction, s * x + a * prediction", "x_0, with a = .*: expected"),
        ("return a * x - s * prediction, s * x - a * prediction", "ε, with a = .*: expected"),
        ("return s * x + a * prediction, a * x - s * prediction", "x_0, with a = .*: expected"),
    ],
    12: [
        ("xt_weight = math.sqrt(alpha_bar / alpha_bar_previous)", "what is left of x_0"),
        (
            "xt_weight = alpha_bar / alpha_bar_previous * (1 - alpha_bar_previous) / rest",
            "what is left of x_0 in the mean",
        ),
        ("xt_weight = math.sqrt(1 - x0_weight**2)", "what is left of x_0 in the mean"),
    ],
    13: [
        ("x = math.sqrt(alpha_bar) * x0 + math.sqrt(rest) * epsilon", "x after a step, with next"),
        ("x = next_alpha_bar * x0 + rest * epsilon", "x after a step, with next_alpha_bar"),
        ("x = math.sqrt(next_alpha_bar) * x0", "x after a step, with next_alpha_bar"),
        (
            "x = math.sqrt(next_alpha_bar) * x0 + math.sqrt(1 - next_alpha_bar) * epsilon",
            "η = 1: x before its fresh noise",
        ),
    ],
    14: [
        ("prediction = with_text + guidance * (with_text - without)", "guidance 1 is the"),
        ("prediction = guidance * (with_text - without)", "guidance 1 is the prediction"),
        ("prediction = without + (with_text - without) / guidance", "guidance 0 is|ZeroDivision"),
    ],
    15: [
        ("return np.minimum(schedule.snr(t), gamma)", "epsilon: the weights"),
        ("return np.maximum(schedule.snr(t), gamma) / _per_x0(schedule, t)", "sample: the weights"),
        ("return np.minimum(schedule.snr(t), gamma) / schedule.snr(t)", "sample: the weights"),
    ],
    16: [
        ("m_hat, v_hat = m, v", "after 4 steps"),
        ("m_hat, v_hat = m / (1 - BETA1), v / (1 - BETA2)", "after 4 steps"),
        (
            "m_hat, v_hat = m / (1 - BETA1 ** (step + 2)), v / (1 - BETA2 ** (step + 2))",
            "after 1 steps",
        ),
    ],
    17: [
        ("average[name] += ema_decay(step, ema) * (w - average[name])", "decay 0.75: the average"),
        ("average[name] += (1 - ema_decay(step, ema)) * w", "decay 0.75: the average"),
        ("average[name] += (1 - ema) * (w - average[name])", "at first: the average"),
    ],
    18: [
        ("x = a * x + (b * square + c * (square * square)) @ x", "singular"),
        ("x = a * x + b * square @ x", "singular values of the result are"),
        ("x = (b * square + c * (square @ square)) @ x", "singular values of the result are"),
    ],
    19: [
        ("a, g, b_t = values(m), values(3), np.linalg.inv(values(m + 2))", "tile of 2×2 outputs"),
        ("a, g, b_t = values(m), values(3), values(m + 2).T", "tile of 2×2 outputs"),
        ("a, g, b_t = values(3), values(m), np.linalg.inv(values(m + 2)).T", "shape|mismatch|size"),
    ],
    20: [
        ("symbols[i], symbols[j] = symbols[j] + symbols[i], None", "expected .'abc'., found"),
        ("symbols[i], symbols[j] = symbols[i] + symbols[j], ''", "'abc' with .* found"),
        ("symbols[i], symbols[j] = symbols[i], None", "expected .'abc'., found"),
    ],
}  # fmt: skip


def written(number, statement, folder):
    """The file of an exercise with this in the place of the blank."""
    lines = EXERCISE[number].text(number).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.endswith("# write this")]
    indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
    lines[at] = textwrap.indent(statement, indent)
    file = folder / f"exercise_{number}.py"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("number", NUMBERS)
def test_the_line_of_the_source_is_right(number, tmp_path):
    exercise = EXERCISE[number]
    check(exercise, written(number, exercise.solution, tmp_path))
    assert exercise.solution not in exercise.text(number) and exercise.hints


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_blank_is_still_to_be_written(number, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXERCISE[number].text(number), encoding="utf-8")
    with pytest.raises(NotYet, match=r"mine\.py, line \d+: still to be written"):
        check(EXERCISE[number], file)


@pytest.mark.parametrize(
    "number, statement, says",
    [(number, *mistake) for number, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_a_mistake_is_named(number, statement, says, tmp_path):
    with pytest.raises(NotYet) as error:
        check(EXERCISE[number], written(number, statement, tmp_path))
    message = " ".join(str(error.value).split())

    assert re.search(says, message), message


def test_every_exercise_has_three_mistakes():
    assert MISTAKES.keys() == EXERCISE.keys() and len(EXERCISE) >= 15
    assert all(len(mistakes) >= 3 for mistakes in MISTAKES.values())


@pytest.mark.parametrize(
    "text, says",
    [
        ("def silu_derivative(x:\n", r"mine\.py, line 1: "),
        ("x = 1 / 0\n", r"mine\.py, line 1: ZeroDivisionError"),
        ("x = 1\n", "expected a function silu_derivative"),
        ("def silu_derivative(x):\n    return y\n", r"mine\.py, line 2: NameError"),
        ("def silu_derivative(x):\n    return x[..., 0]\n", "expected|shape|gradient"),
    ],
)
def test_what_cannot_be_run(text, says, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(NotYet, match=says):
        check(EXERCISE[2], tmp_path / "mine.py")


def test_from_the_command_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = call("exercise").out.splitlines()
    assert len(listed) == len(EXERCISES) and listed[2].endswith("softmax, backward")
    begun = call("exercise", 2)
    assert begun.code == 0 and "exercise_2.py: written" in begun.out
    blank = call("exercise", 2)
    assert blank.code == 1 and "not yet right\nexercise_2.py, line " in blank.err
    written(2, EXERCISE[2].solution, tmp_path)
    right = call("exercise", 2)
    assert right.code == 0 and right.out == "exercise 2: right; next: tinyldm exercise 3\n"
    assert call("exercise", 2, "--solution").out == EXERCISE[2].solution + "\n"
    hints = call("exercise", 2, "--hints")
    assert hints.out == f"* {EXERCISE[2].hints[0]}\n" and "1 more: --hints 2" in hints.err
    assert "that is all" in call("exercise", 2, "--hints", 2).err
    assert call("exercise", 21).code == call("exercise", 2, "--hints", 0).code == 2
