"""The config of a diffusers scheduler: what each of its keys does here.

Every key of the classes that the samplers stand for is read, or has some values that are
implemented, or changes nothing. A test compares these tables with the classes of the library.
"""

import math
import re

from tinyldm.config import LARGEST, ConfigError, Kind, brief, check_kind, meant

READ: dict[str, Kind] = {  # key → kind of its value
    "_class_name": str,
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
BETA_START, BETA_END = 1e-4, 0.02  # where a config gives none; but for these classes:
BETA_ENDS = {"HeunDiscreteScheduler": (0.00085, 0.012)}
OFF = (None, False)
THRESHOLDING = {"thresholding": OFF}  # of pixels; latents have no range
OTHER_SIGMAS = {"use_exponential_sigmas": OFF, "use_beta_sigmas": OFF}
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
FINAL = {"final_sigmas_type": ("zero", "sigma_min")}
NO_ZERO_SNR = {"rescale_betas_zero_snr": OFF}
NO_OWN_ENDS = {"sigma_min": (None,), "sigma_max": (None,)}
ONLY = {  # class → {key: the values that are implemented}; or of keys that the class has not
    "DDPMScheduler": THRESHOLDING | {"variance_type": (None, *VARIANCES)},
    "DDIMScheduler": THRESHOLDING,
    "EulerDiscreteScheduler": OTHER_SIGMAS
    | FINAL
    | {"interpolation_type": (None, "linear"), "timestep_type": (None, "discrete")},
    "PNDMScheduler": NO_ZERO_SNR,
    "EulerAncestralDiscreteScheduler": {"use_karras_sigmas": OFF},
    "HeunDiscreteScheduler": OTHER_SIGMAS | NO_ZERO_SNR | NO_OWN_ENDS | {"clip_sample": OFF},
    "DPMSolverMultistepScheduler": THRESHOLDING
    | OTHER_SIGMAS
    | NO_OWN_ENDS
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
    "predict_x0": "of UniPC, for which another sampler is taken",
    "solver_p": "of UniPC",
    "disable_corrector": "of UniPC",
    "shift_terminal": "of UniPC",
    "tensor_format": "of versions before 0.3",
}
KNOWN = {"trained_betas", *READ, *HARMLESS, *(key for only in ONLY.values() for key in only)}
SPACINGS = ("leading", "trailing", "linspace")


def check_scheduler(config: dict) -> None:
    """Raise ConfigError for an unknown key, a value of the wrong kind, or `trained_betas`."""
    for key in config:
        if key not in KNOWN and not key.startswith("_"):
            raise ConfigError(f"scheduler config: unknown key {brief(key)}{meant(key, KNOWN)}")
    for key, kind in READ.items():
        if key in config:
            least, most = (1, 100_000) if key == "num_train_timesteps" else (0, LARGEST)
            check_kind("scheduler config", key, config[key], kind, least, most)
    least, most = config.get("sigma_min"), config.get("sigma_max")
    if not 0 < (1e-9 if least is None else least) < (math.inf if most is None else most):
        raise ConfigError(
            f"scheduler config: expected 0 < sigma_min < sigma_max, found {least} and {most}"
        )
    spacing = config.get("timestep_spacing", SPACINGS[0])
    if spacing not in SPACINGS:
        raise ConfigError(
            f"scheduler config: timestep_spacing = {brief(spacing)} is not implemented, only "
            f"{', '.join(SPACINGS)}"
        )
    if config.get("trained_betas") is not None:
        raise ConfigError("scheduler config: trained_betas is not implemented")


def check_sampler(config: dict, scheduler: str) -> None:
    """Raise ConfigError, by name, for what the sampler of this class of diffusers cannot do."""
    for key, values in ONLY.get(scheduler, {}).items():
        value = config.get(key, values[0])
        if value not in values:
            known = " or ".join(str(each) for each in values if each is not None) or "null"
            raise ConfigError(
                f"scheduler_config.json: {key} = {brief(value)} is not implemented for this "
                f"sampler, only {known}; take another, such as ddim"
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
