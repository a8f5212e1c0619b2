"""The config of a diffusers scheduler: what each of its keys does here.

Every key of the classes that the samplers stand for is read, or has some values that are
implemented, or changes nothing. A test compares these tables with the classes of the library.
"""

import math
import re

from tinyldm.config import LARGEST, ConfigError, Kind, check_kind

READ: dict[str, Kind] = {  # key → kind of its value
    "num_train_timesteps": int,
    "beta_start": float,
    "beta_end": float,
    "beta_schedule": str,
    "prediction_type": str,
    "timestep_spacing": str,
    "steps_offset": int,
    "rescale_betas_zero_snr": bool | int,  # written as 0 or 1 by some
    "clip_sample": bool,
    "clip_sample_range": float,
    "set_alpha_to_one": bool,
    "skip_prk_steps": bool,
    "use_karras_sigmas": bool | None,
    "sigma_min": float | None,
    "sigma_max": float | None,
    "lower_order_final": bool,
    "euler_at_final": bool,
}
OFF = (None, False)
THRESHOLDING = {"thresholding": OFF}  # of pixels; latents have no range
OTHER_SIGMAS = {"use_exponential_sigmas": OFF, "use_beta_sigmas": OFF}
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
FINAL = {"final_sigmas_type": ("zero", "sigma_min")}
ONLY = {  # class → {key: the values that are implemented}
    "DDPMScheduler": THRESHOLDING | {"variance_type": (None, *VARIANCES)},
    "DDIMScheduler": THRESHOLDING,
    "EulerDiscreteScheduler": OTHER_SIGMAS
    | FINAL
    | {"interpolation_type": (None, "linear"), "timestep_type": (None, "discrete")},
    "HeunDiscreteScheduler": OTHER_SIGMAS | {"clip_sample": OFF},
    "DPMSolverMultistepScheduler": THRESHOLDING
    | OTHER_SIGMAS
    | FINAL
    | {
        "solver_order": (None, 2),
        # Keys of DEIS and UniPC, from whose configs diffusers builds an ordinary DPM-Solver++.
        "solver_type": (None, "midpoint", "logrho", "bh1", "bh2"),
        "algorithm_type": (None, "dpmsolver++", "sde-dpmsolver++", "deis"),
        "use_lu_lambdas": OFF,
        "use_flow_sigmas": OFF,
        "use_dynamic_shifting": OFF,
        "lambda_min_clipped": (None, -float("inf")),
        "variance_type": (None, *VARIANCES, "fixed_large_log"),  # if not learned, it is not used
    },
}
HARMLESS = {  # key → why it changes nothing
    "dynamic_thresholding_ratio": "only with thresholding",
    "sample_max_value": "only with thresholding",
    "flow_shift": "only with use_flow_sigmas",
    "time_shift_type": "only with use_dynamic_shifting",
}


def check_scheduler(config: dict) -> None:
    """Raise ConfigError for a value of the wrong kind, or for `trained_betas`."""
    for key, kind in READ.items():
        if key in config:
            least, most = (1, 100_000) if key == "num_train_timesteps" else (0, LARGEST)
            check_kind("scheduler config", key, config[key], kind, least, most)
    least, most = config.get("sigma_min"), config.get("sigma_max")
    if not 0 < (1e-9 if least is None else least) < (math.inf if most is None else most):
        raise ConfigError(
            f"scheduler config: expected 0 < sigma_min < sigma_max, found {least} and {most}"
        )
    if config.get("trained_betas") is not None:
        raise ConfigError("scheduler config: trained_betas is not implemented")


def check_sampler(config: dict, scheduler: str) -> None:
    """Raise ConfigError, by name, for what the sampler of this class of diffusers cannot do."""
    for key, values in ONLY.get(scheduler, {}).items():
        value = config.get(key, values[0])
        if value not in values:
            known = " or ".join(str(each) for each in values if each is not None)
            raise ConfigError(
                f"scheduler config: {key} = {value!r} is not implemented for this sampler, only "
                f"{known}; take another, such as ddim"
            )


def repaired(scheduler: dict, unet: dict, inpainting: bool) -> tuple[dict, dict]:
    """Return the configs as diffusers' pipelines of Stable Diffusion repair them on loading.

    An offset of the time steps other than 1 becomes 1, latents are not clipped, and a U-Net written
    before version 0.9 was trained on latents of at least 64 pixels of a side. Inpainting skips the
    Runge-Kutta steps of PNDM.
    """
    scheduler = scheduler | {"steps_offset": 1}
    if scheduler.get("clip_sample"):
        scheduler["clip_sample"] = False
    if inpainting and scheduler.get("_class_name") == "PNDMScheduler":
        scheduler["skip_prk_steps"] = True
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "1.0")))
    size = unet.get("sample_size")
    if version and tuple(map(int, version.groups())) < (0, 9) and isinstance(size, int):
        unet = unet | {"sample_size": max(64, size)}
    return scheduler, unet
