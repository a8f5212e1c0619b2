"""The table of a model's scores: each with its standard error, and with what it means."""

from tinyldm.data.shapes import ATTRIBUTES

FLOOR = "left to whoever knows the images: latents have noise of their own"


def table(result: dict) -> str:
    """Format the result of `evaluate` as lines of text, each value with what it means."""
    lines = []

    def said(*names, digits=3, times=1, unit=""):
        """Write a value with its standard error."""
        value, error = result, result["error"]
        for name in names:
            value, error = value[name], error[name]
        if value is None:
            return "–"
        text = f"{times * value:.{digits}f}"
        return text + (f" ± {times * error:.{digits}f}" if error is not None else "") + unit

    if "seen" in result:
        rows = {
            "reader": "attribute reader, real images",
            "reconstructed": "first stage, reconstructions",
            "seen": "generated, combinations seen",
            "held_out": "generated, combinations held out",
        }
        names = [*ATTRIBUTES, "all"]
        lines.append("right by rule, in %".ljust(32) + "".join(f"{name:>13}" for name in names))
        for row, title in rows.items():
            if row in result:
                shares = (
                    said(row, name, digits=1, times=100) if name in result[row] else ""
                    for name in names
                )  # fmt: skip
                lines.append(title.ljust(32) + "".join(f"{share:>13}" for share in shares))
        if "seen" in result.get("drawing", {}):
            numbers = f"{said('drawing', 'seen', digits=1)}"
            numbers += f" (reconstructions {said('drawing', 'reconstructed', digits=1)})"
            meaning = "median difference from the nearest drawing of the caption, of 255"
            lines.append(_row("distance from true drawings", numbers, meaning))
        lines.append(f"{result['captions']} images generated\n")
    unseen = "held_out" in result["loss_by_noise"]
    which = "held-out images" if unseen else "training images (none are held out)"
    lines += [
        f"{which}: {result['images']['held_out' if unseen else 'trained_on']}",
        _row("first stage, PSNR", said("psnr", digits=1, unit=" dB"),
             "decoded against the image; 30 is soft, 40 is hard to tell apart"),
        _row("first stage, SSIM", said("ssim"), "structural similarity; 1 is equal"),
    ]  # fmt: skip
    lines += _rows_of_task(result.get("task", {}), said)
    for name, losses in result["loss_by_noise"].items():
        bands = [said("loss_by_noise", name, band) for band in range(len(losses))]
        meaning = FLOOR if name == "floor" else ""
        lines.append(_row(f"loss by noise, {name.replace('_', '-')}", "  ".join(bands), meaning))
    lines.append(_row("", "", "from little noise to nearly all; far apart means overfitting"))
    bits = said("bits", "training", digits=2)
    bits += f" (held-out {said('bits', 'held_out', digits=2)})" if unseen else ""
    meaning = "upper bound, per latent value (per pixel value, without a first stage)"
    lines.append(_row("bits per dimension", bits, meaning))
    if "frechet" in result:
        lines.append(_compared_by(result["features"]))
    meanings = {
        "frechet": ("Fréchet distance", "of generated to training images; 0 is alike"),
        "kernel": ("kernel distance", "KID, without assuming Gaussians; about 0 is alike"),
        "precision": ("precision", "share of generated images that lie among training images"),
        "recall": ("recall", "share of training images that lie among generated ones"),
        "nearest": ("nearest training image", "median difference, in levels of 255"),
    }
    for key, (title, meaning) in meanings.items():
        if key in result:
            numbers = said(key, "generated")
            if "held_out" in result[key]:
                numbers += f" (held-out {said(key, 'held_out')})"
            lines.append(_row(title, numbers, meaning))
    if "copied" in result["nearest"]:
        share = said("nearest", "copied", digits=1, times=100, unit=" %")
        lines.append(_row("copied from training", share,
                          "nearer to a training image than 95 % of held-out ones are; "
                          "about 5 % means that nothing is copied"))  # fmt: skip
    lines.append(
        "(± is a standard error: about how far other images and other noise would be away)"
    )
    return "\n".join(lines)


def _rows_of_task(task, said):
    name = task.get("name")
    if not task.keys() & {"psnr", "psnr_seen"}:
        return []
    if "psnr_seen" in task:
        meaning = "of the unmasked part, generated against the image"
        return [_row(f"{name}, PSNR", said("task", "psnr_seen", digits=1, unit=" dB"), meaning)]
    meaning = "generated against the image (in brackets: the input)"
    psnrs = f"{said('task', 'psnr', digits=1)} dB (given {said('task', 'psnr_given', digits=1)} dB)"
    ssims = f"{said('task', 'ssim')} (given {said('task', 'ssim_given')})"
    return [_row(f"{name}, PSNR", psnrs, meaning), _row(f"{name}, SSIM", ssims, "")]


def _compared_by(features):
    if features["kind"] == "latents":
        return _row("images compared by", "latents", "averaged over a coarse grid")
    meaning = f"right on {100 * features['accuracy']:.1f} % of held-out images"
    return _row("images compared by", "features of a classifier", meaning)


def _row(title, numbers, meaning):
    return f"{title:32}{numbers:42}  {meaning}".rstrip()
