"""The noise schedule: how much signal and how much noise there is at each time step.

The forward process mixes an image x_0 with normal noise ε (Ho et al. 2020, eq. 4):

    x_t = a_t x_0 + s_t ε,    a_t = √ᾱ_t,  s_t = √(1 − ᾱ_t),  ᾱ_t = Π_{i ≤ t} (1 − β_i)

Tables are float64 on the host, whatever the precision and the device of the model.
"""

import functools
import math

import numpy as np

from tinyldm.backend import Array, array_module, on_host
from tinyldm.config import ConfigError, brief
from tinyldm.diffusion.scheduler_config import BETA_END, BETA_ENDS, BETA_START, check_scheduler

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def linear_betas(steps: int, start: float, end: float) -> np.ndarray:
    """Linear schedule: β (steps,) from `start` to `end` in equal steps (Ho et al. 2020, sec. 4)."""
    return np.linspace(start, end, steps)


def scaled_linear_betas(steps: int, start: float, end: float) -> np.ndarray:
    """Scaled-linear schedule, linear in √β: that of Stable Diffusion (there called "linear")."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def cosine_betas(steps: int, start: float, end: float) -> np.ndarray:
    """Cosine schedule: ᾱ falls as a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    It has no ends to choose: `start` and `end` are not used.
    """

    def alpha_bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    u = [i / steps for i in range(steps + 1)]
    return np.array(
        [min(1 - alpha_bar(b) / alpha_bar(a), 0.999) for a, b in zip(u, u[1:], strict=False)]
    )


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Zero terminal SNR: shift and scale √ᾱ so that it ends at 0 (Lin et al. 2023, algorithm 1).

    Its first value stays. Sampling then begins where training ends: at pure noise.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    alphas_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - np.append(alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1])


BETAS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}


class Schedule:
    """Noise schedule of T steps: its tables, and conversions between what a network may predict.

    config: the keys of a diffusers scheduler config; others are kept but not used here. Raises
    ConfigError for what is not implemented.
    """

    def __init__(self, config: dict):
        check_scheduler(config)
        self.config = config
        steps = config.get("num_train_timesteps", 1000)
        ends = BETA_ENDS.get(config.get("_class_name"), (BETA_START, BETA_END))
        start, end = config.get("beta_start", ends[0]), config.get("beta_end", ends[1])
        kind = config.get("beta_schedule", "linear")
        if kind not in BETAS:
            raise ConfigError(
                f"scheduler config: beta_schedule = {brief(kind)} is not implemented, "
                f"only {', '.join(BETAS)}"
            )
        if not (steps >= 1 and 0 < start <= end < 1):
            raise ConfigError(
                "scheduler config: expected num_train_timesteps ≥ 1 and 0 < beta_start ≤ beta_end "
                f"< 1, found {steps}, {start}, {end}"
            )
        self.prediction = config.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise ConfigError(
                f"scheduler config: prediction_type = {brief(self.prediction)} is not implemented, "
                f"only {', '.join(PREDICTIONS)}"
            )
        self.betas = BETAS[kind](steps, start, end)
        if config.get("rescale_betas_zero_snr"):
            if self.prediction == "epsilon":
                raise ConfigError(
                    "scheduler config: rescale_betas_zero_snr leaves no signal at the last step, "
                    "from where a prediction of ε does not lead back; take v_prediction"
                )
            self.betas = zero_terminal_snr(self.betas)
        self.alphas_bar = np.cumprod(1 - self.betas)

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def sigmas(self) -> np.ndarray:
        """Return noise relative to signal, s_t / a_t (T,), the time of Karras et al. 2022.

        Where no signal is left it is the value for ᾱ = 2⁻²⁴, as in diffusers.
        """
        alphas_bar = np.where(self.alphas_bar > 0, self.alphas_bar, 2.0**-24)
        return np.sqrt(1 / alphas_bar - 1)

    def snr(self, t: np.ndarray) -> np.ndarray:
        """Return the signal-to-noise ratio, ᾱ / (1 − ᾱ), at the steps t."""
        return self.alphas_bar[t] / (1 - self.alphas_bar[t])

    def signal_and_noise(self, t: Array, like: Array) -> tuple[Array, Array]:
        """Return a_t, s_t at the steps t (n,), shaped to multiply `like` (n, ...) on its device."""
        shape = (-1, *[1] * (like.ndim - 1))
        a, s = np.sqrt([self.alphas_bar, 1 - self.alphas_bar])
        return look_up(a, t, like).reshape(shape), look_up(s, t, like).reshape(shape)

    def add_noise(self, x0: Array, noise: Array, t: Array) -> Array:
        """Draw x_t from q(x_t | x_0) with the given standard normal noise, at the steps t (n,)."""
        a, s = self.signal_and_noise(t, x0)
        return a * x0 + s * noise

    def target(self, x0: Array, noise: Array, t: Array) -> Array:
        """Return the target at x_t: ε, x_0, or v = a ε − s x_0 (Salimans & Ho 2022, section 4)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        a, s = self.signal_and_noise(t, x0)
        return a * noise - s * x0

    def split(self, prediction: Array, x: Array, alpha_bar: float) -> tuple[Array, Array]:
        """Split a prediction at x, where ᾱ is `alpha_bar`, into the x_0 and ε that it implies.

        From x = a x_0 + s ε; with v = a ε − s x_0 and a² + s² = 1, x_0 = a x − s v and
        ε = s x + a v.
        """
        a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        if self.prediction == "epsilon":
            return (x - s * prediction) / a, prediction
        if self.prediction == "sample":
            return prediction, (x - a * prediction) / s
        return a * x - s * prediction, s * x + a * prediction


def look_up(table: np.ndarray, t: Array, like: Array) -> Array:
    """Look up a table (T,) at the steps t (n,), in the dtype and on the device of `like`.

    Where t is on a device, too, nothing is copied to it but the table, once.
    """
    xp = array_module(like)
    if on_host(t):
        return xp.asarray(table[t].astype(like.dtype))
    return _table_on_device(xp, table.astype(like.dtype).tobytes(), like.dtype)[t]


@functools.cache
def _table_on_device(xp, numbers, dtype):
    return xp.asarray(np.frombuffer(numbers, dtype))


def posterior(alpha_bar: float, alpha_bar_previous: float) -> tuple[float, float, float]:
    """Posterior q(x_r | x_t, x_0) for r before t: (weight of x_0, weight of x_t, variance).

    Ho et al. 2020, eq. 6 and 7, with β and α taken between the two steps, however far apart.
    """
    beta = (alpha_bar_previous - alpha_bar) / alpha_bar_previous  # as 1 − ᾱ/ᾱ_r, digits are lost
    rest = 1 - alpha_bar
    x0_weight = math.sqrt(alpha_bar_previous) * beta / rest
    xt_weight = math.sqrt(alpha_bar / alpha_bar_previous) * (1 - alpha_bar_previous) / rest
    return x0_weight, xt_weight, (1 - alpha_bar_previous) / rest * beta
