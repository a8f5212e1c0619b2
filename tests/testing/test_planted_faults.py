"""Are the gradient checks worth anything? Each fault planted here in the real source is found.

A fault is a small change of text, of the kind that is made by hand: a lost term, a sign, a factor,
a transposed weight, a sum that is not accumulated. The changed file is compiled into a module of
its own, and the gradient check of what was changed must fail on it; on the unchanged text it must
pass. A text that is no longer in the source, or is there twice, is an error, so the table stays
true to the code. `tests/mutants.py` plants hundreds more, by the syntax tree.
"""

import pytest
from backward_checks import CHECKS, MODULES, SMALL, plant, source_of

from tinyldm.kernels import blocking, plain
from tinyldm.testing import GradientError, diagnosis


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """No real kernel stands in for what is planted, and the planted ones cut even small arrays."""
    monkeypatch.setattr(blocking, "BLOCK", SMALL)
    monkeypatch.setattr(diagnosis, "MOST_SECONDS", 0)  # that it is found is enough here
    with plain():
        yield


def with_fault(name, old, new):
    """The module `name`, compiled from its source with the one `old` in it replaced by `new`."""
    path, source = source_of(name)
    assert source.count(old) == 1, f"{path.name} has {source.count(old)} times: {old}"
    return plant(name, source.replace(old, new))


# --------------------------------------------------------------------------------------- the faults
#
# {module: [(check: what is wrong, old text, new text)]}

FAULTS = {
    "tinyldm.nn.activations": [
        ("silu: sign", "s * (1 + x * (1 - s))", "s * (1 - x * (1 - s))"),
        ("silu: dy lost", "return dy * derivative(x)", "return derivative(x)"),
        ("silu: slope at dy", "return dy * derivative(x)", "return dy * derivative(dy)"),
        (
            "leaky_relu: slope squared",
            "return x * leaky_relu_derivative(x)",
            "return x * leaky_relu_derivative(x) ** 2",
        ),
        ("quick_gelu: factor lost", "silu_derivative(1.702 * x)", "silu_derivative(x)"),
        ("gelu: term lost", "normal_cdf(x) + x * density", "normal_cdf(x)"),
        ("gelu: factor of the density", "1 / math.sqrt(2 * math.pi)", "1 / math.sqrt(math.pi)"),
        ("gelu: exponent of the density", "exp(-0.5 * x * x)", "exp(-1.0 * x * x)"),
        ("geglu: value lost", "gelu_back(dy * value)", "gelu_back(dy)"),
        (
            "geglu: halves swapped",
            "[dy * activated, gelu_back(dy * value)]",
            "[gelu_back(dy * value), dy * activated]",
        ),
    ],
    "tinyldm.kernels.cpu.activations": [
        ("gelu: term lost", "y += cdf\n", "y += 0\n"),
        ("gelu: factor of the density", "1 / math.sqrt(2 * math.pi)", "1 / math.sqrt(math.pi)"),
        ("gelu: exponent of the density", "y *= -0.5\n", "y *= -1\n"),
        ("gelu: slope of another", "_slope(x, normal_cdf(x))", "_slope(x, normal_cdf(-x))"),
        ("geglu: term lost", "slope *= value\n", "slope *= 1\n"),
        ("geglu: value for gate", "(cdf, gate, out=slope)", "(cdf, value, out=slope)"),
        ("geglu: dy lost", "np.multiply(dy_, slope, out=dx_[:, :d])", "dx_[:, :d] = slope"),
        (
            "silu: dy lost",
            "np.multiply(dy_, derivative(x_), out=dx_)",
            "dx_[...] = derivative(x_)",
        ),
        ("silu: slope at dy", "derivative(x_)", "derivative(dy_)"),
    ],
    "tinyldm.kernels.cpu.linear": [
        ("linear: weight transposed in dx", "matmul(dy_rows, w, out", "matmul(dy_rows, w.T, out"),
        ("linear: dw transposed", "dx, dy_rows.T @ x_rows,", "dx, x_rows.T @ dy_rows,"),
        ("linear: db a mean", "else ones @ dy_rows", "else ones @ dy_rows / len(dy_rows)"),
    ],
    "tinyldm.nn.functional": [
        ("offset: a mean", "dtable[:l] = dy.sum(axis=0)", "dtable[:l] = dy.mean(axis=0)"),
        ("offset: rows from the end", "dtable[:l] = dy.sum", "dtable[-l:] = dy.sum"),
        ("linear: weight transposed in dx", "dx = dy @ w\n", "dx = dy @ w.T\n"),
        ("linear: dw transposed", "dx, dy_rows.T @ x_rows,", "dx, x_rows.T @ dy_rows,"),
        ("linear: db a mean", "else dy_rows.sum(axis=0)", "else dy_rows.mean(axis=0)"),
        (
            "embedding: repeated ids do not add up",
            "xp.add.at(dtable, ids.reshape(-1), rows)",
            "dtable[ids.reshape(-1)] = rows",
        ),
        ("upsample: one of four lost", "\n            + quads[:, :, 1, :, 1]", ""),
        (
            "upsample: odd sizes cut at the wrong side",
            "whole[:, :out_h, :out_w] = dy",
            "whole[:, -out_h:, -out_w:] = dy",
        ),
        ("mean: a sum", "dy * (dy.size / math.prod(shape))", "dy"),
        ("concatenate: swapped", "dx, dy = xp.split", "dy, dx = xp.split"),
        ("mse: factor", "(dloss * (2 / x.size))", "(dloss * (1 / x.size))"),
        ("mse: mean over the wrong size", "(dloss * (2 / x.size))", "(dloss * (2 / len(x)))"),
        ("mse: weights lost", "dx = scaled * (dloss", "dx = difference * (dloss"),
        (
            "mse: sign for the target",
            "(2 / x.size))\n        return dx, -dx",
            "(2 / x.size))\n        return dx, dx",
        ),
        (
            "hinge: mean over the wrong size",
            "(-0.5 * dloss / on_real.size)",
            "(-0.5 * dloss / len(on_real))",
        ),
        ("hinge: sign", "(0.5 * dloss / on_fake.size)", "(-0.5 * dloss / on_fake.size)"),
        (
            "hinge: satisfied logits are pushed on",
            "too_low.astype(on_real.dtype) * (-0.5",
            "array_module(on_real).ones_like(on_real) * (-0.5",
        ),
        ("weighted_mean: weights lost", "+ weights * (dloss / x.size)", "+ dloss / x.size"),
        ("weighted_mean: size lost", "weights * (dloss / x.size)", "weights * dloss"),
        ("cross_entropy: the right class forgotten", "dlogits[right] -= 1", "pass"),
        ("cross_entropy: denominator lost", "dlogits = powers / total", "dlogits = 1 * powers"),
        ("cross_entropy: 1/n lost", "dlogits * (dloss / n)", "dlogits * dloss"),
        ("kl: 1/n lost", "return mean * (dloss / n)", "return mean * dloss"),
        ("kl: term lost", "(variance - 1) * (0.5", "variance * (0.5"),
    ],
    "tinyldm.nn.norms": [
        ("group_norm: the mean moves, forgotten", "dx_hat - shift - x_hat", "dx_hat - x_hat"),
        ("group_norm: the variance moves, forgotten", "- shift - x_hat * stretch", "- shift"),
        ("group_norm: 1/√variance lost", "return r * (dx_hat", "return (dx_hat"),
        ("group_norm: scale lost", "(dy * w).reshape(grouped)", "dy.reshape(grouped)"),
        (
            "group_norm: dw of the scaled result",
            "(dy * x_hat).reshape(-1, c)",
            "(dy * x_hat * w).reshape(-1, c)",
        ),
        (
            "group_norm: db a mean",
            "dy.reshape(-1, c).sum(axis=0)",
            "dy.reshape(-1, c).mean(axis=0)",
        ),
        (
            "group_norm_silu: slope lost",
            "norm_back(silu_back(dy), weights",
            "norm_back(dy, weights",
        ),
        ("layer_norm: scale lost", "normalise_back(dy * w)\n", "normalise_back(dy)\n"),
        ("layer_norm: dw a sum of dy", "(dy * x_hat).reshape(-1, d)", "dy.reshape(-1, d)"),
        (
            "unit_norm: the length moves, forgotten",
            "scale * dy - x * (along",
            "scale * dy - 0 * (along",
        ),
        ("unit_norm: sign", "scale * dy - x * (along", "scale * dy + x * (along"),
        ("unit_norm: scale lost in a sum", "keepdims=True) * scale\n", "keepdims=True)\n"),
    ],
    "tinyldm.kernels.cpu.group_norm": [
        ("group_norm: the mean moves, forgotten", "centred += across", "pass"),
        ("group_norm: the variance moves, forgotten", "centred *= along", "centred *= 0"),
        ("group_norm: scale lost in a mean", "group_means(means * w)", "group_means(means)"),
        ("group_norm: mean over the wrong size", "members.T * (1 / size)", "members.T * (1 / c)"),
        (
            "group_norm: rstd lost",
            "np.multiply(dz, scale, out=dx_[:, ps])",
            "np.multiply(dz, w_half, out=dx_[:, ps])",
        ),
        (
            "group_norm: statistics of the last sample for all",
            "x3[ns], dy3[ns], dx[ns], rstd[ns]",
            "x3[ns], dy3[ns], dx[ns], rstd[-1:]",
        ),
        (
            "group_norm: dw of the last sample only",
            "reduce(add, on_free_cores(part, samples, x.size, x))",
            "on_free_cores(part, samples, x.size, x)[-1]",
        ),
        (
            "group_norm: means of the last positions only",
            "half * reduce(add, on_free_cores(moments, cut, x_.size, x))",
            "half * on_free_cores(moments, cut, x_.size, x)[-1]",
        ),
        (
            "group_norm_silu: slope taken before scale and shift",
            "np.multiply(centred, scale, out=h)\n                    h += shift",
            "np.multiply(centred, repeated(half * rstd_, x_), out=h)",
        ),
    ],
    "tinyldm.kernels.cpu.layer_norm": [
        ("layer_norm: scale lost", "along = product @ w_average", "along = product @ average"),
        ("layer_norm: the mean moves, forgotten", "dx_ -= _columns(across, table)", "pass"),
        ("layer_norm: the variance moves less", "along * rstd_**3", "along * rstd_**2"),
        ("layer_norm: dw without the deviation", "rstd_.T @ product", "np.sign(rstd_).T @ product"),
        (
            "layer_norm: dw and db of the last rows only",
            "(sum(z)[0] for z in zip(*parts, strict=True))",
            "(z[-1][0] for z in zip(*parts, strict=True))",
        ),
    ],
    "tinyldm.kernels.cpu.winograd": [
        ("winograd: dw of the last block only", "dkernels += more", "dkernels = more"),
        (
            "winograd: bias forgotten",
            "if b is not None:\n                    add_to_rows(out, b[ks])",
            "if b is not None:\n                    pass",
        ),
        (
            "winograd: bias of the first channels for all",
            "add_to_rows(out, b[ks])",
            "add_to_rows(out, b[:1].repeat(out.shape[-1]))",
        ),
        ("winograd: places of dy reversed", '"doutput": a}', '"doutput": a[::-1]}'),
        ("winograd: places of dw reversed", '"dkernel": g.T', '"dkernel": g[::-1].T'),
        ("winograd: the first kernels for all", "w[..., ks]", "w[..., :1]"),
        (
            "winograd: dy moved where it does not divide",
            "whole[:, :out_h, :out_w] = dy",
            "whole[:, -out_h:, -out_w:] = dy",
        ),
    ],
    "tinyldm.nn.conv": [
        (
            "conv2d: scattered products do not add up",
            "+= dwindows[:, :, :, i, j]",
            "= dwindows[:, :, :, i, j]",
        ),
        (
            "conv2d: padding cut at the wrong sides",
            "dx = dpadded[:, top : top + h, left : left + width]",
            "dx = dpadded[:, bottom : bottom + h, right : right + width]",
        ),
        (
            "conv2d: everything scattered to the top",
            "slice(i, i + stride * out_h, stride)",
            "slice(0, stride * out_h, stride)",
        ),
        ("conv2d: db a mean", "else dy_rows.sum(axis=0)", "else dy_rows.mean(axis=0)"),
        ("conv2d: dw of the result", ".T @ dy_rows).reshape(w.shape)", ".T @ y).reshape(w.shape)"),
    ],
    "tinyldm.kernels.cpu.pointwise": [
        ("pointwise: dw transposed", "(dw.T)[", "(dw)["),
        ("pointwise: db lost", "return dx, dw, db", "return dx, dw, db * 0"),
    ],
    "tinyldm.kernels.windows": [
        ("windows: kernel not turned", "w[::-1, ::-1].swapaxes", "w.swapaxes"),
        ("windows: kernel turned one way", "w[::-1, ::-1].swapaxes", "w[::-1].swapaxes"),
        ("windows: kernel not transposed", ".swapaxes(2, 3)", ""),
        (
            "windows: top and bottom swapped in dx",
            "(kh - 1 - top, kh - 1 - bottom,",
            "(kh - 1 - bottom, kh - 1 - top,",
        ),
        (
            "windows: padding of dx off by one",
            "kw - 1 - left, kw - 1 - right)",
            "kw - left, kw - 2 - right)",
        ),
        (
            "windows: db a mean",
            "ones(len(dy_rows), dy.dtype) @ dy_rows",
            "ones(len(dy_rows), dy.dtype) @ dy_rows / len(dy_rows)",
        ),
    ],
    "tinyldm.kernels.im2col": [
        ("im2col: dw of the last block only", "dw += _rows", "dw = _rows"),
        (
            "im2col: scattered products do not add up",
            "+= products[:, :, :, i, j]",
            "= products[:, :, :, i, j]",
        ),
        (
            "im2col: padding cut at the wrong sides",
            "return padded[:, top : top + h, left : left + width]",
            "return padded[:, bottom : bottom + h, right : right + width]",
        ),
        (
            "im2col: every block scattered to the top",
            "y0, y1 = hs.start * stride + i, (hs.stop - 1) * stride + i + 1",
            "y0, y1 = i, (hs.stop - hs.start - 1) * stride + i + 1",
        ),
    ],
    "tinyldm.nn.attention": [
        ("attention: scale of q lost", "split_heads(q * scale, heads)", "split_heads(q, heads)"),
        ("attention: scale of dq lost", "ds @ k * scale", "ds @ k"),
        (
            "attention: the denominator moves, forgotten",
            "p * (dp - (p * dp).sum(axis=3, keepdims=True))",
            "p * dp",
        ),
        (
            "attention: dk and dv swapped",
            "join_heads(dk), join_heads(dv)",
            "join_heads(dv), join_heads(dk)",
        ),
        ("attention: dy for q", "ds.swapaxes(2, 3) @ q", "ds.swapaxes(2, 3) @ dy"),
        (
            "attention: dv of the scores",
            "dv = p.swapaxes(2, 3) @ dy",
            "dv = scores.swapaxes(2, 3) @ dy",
        ),
    ],
    "tinyldm.kernels.attention": [
        ("attention: scale of q lost", "scaled = q * scale", "scaled = q"),
        ("attention: scale of dq lost", "        dqs *= scale\n", ""),
        (
            "attention: no causal mask on the way back",
            "if causal:\n                    p += _causal_mask(xp, ls, m)\n                xp.exp",
            "xp.exp",
        ),
        (
            "attention: the denominator moves, forgotten",
            "xp.negative(mean, out=dys[..., -1:])",
            "dys[..., -1] = 0",
        ),
        ("attention: denominator lost", "xp.log(total, out=total)", "total *= 0"),
        ("attention: dk of the last block only", "dks[ns, hs] += ds", "dks[ns, hs] = ds"),
        ("attention: dv of the last block only", "dvs[ns, hs] += p", "dvs[ns, hs] = p"),
        ("attention: dk and dv swapped", "in (dqs, dks, dvs))", "in (dqs, dvs, dks))"),
        ("attention: dy for q", "@ queries[ns, hs, ls, :-1]", "@ dys[ns, hs, ls, :-1]"),
    ],
    "tinyldm.nn.layers": [
        ("Linear: bias forgotten", "zip(self.weights, dweights", "zip([self.weight], dweights"),
        (
            "Linear: under another name",
            "add_grad(grads, name, dw)",
            "add_grad(grads, name[:-1], dw)",
        ),
    ],
    "tinyldm.nn.protocol": [
        ("add_grad: the last use only", "grads[name] += dw", "grads[name] = dw"),
        ("add_grad: the first use only", "grads[name] += dw", "pass"),
    ],
    "tinyldm.models.blocks": [
        ("SpatialTransformer: one of two", "else a if b is None else a + b", "else b"),
        (
            "ResnetBlock: gradient around the block lost",
            "dh += dx\n            return dh, dtime",
            "return dh, dtime",
        ),
        ("ResnetBlock: dtime a mean", "dh.sum(axis=(1, 2))", "dh.mean(axis=(1, 2))"),
        ("ResnetBlock: dtime of the output", "time_back(dh.sum", "time_back(dy.sum"),
        (
            "Attention: shared input counted once",
            "dx += dsource\n            return dx, None",
            "return dx, None",
        ),
        (
            "Attention: keys and values swapped",
            "k_back(dk, grads)\n            dsource += v_back(dv, grads)",
            "k_back(dv, grads)\n            dsource += v_back(dk, grads)",
        ),
        ("TransformerBlock: gradient around lost", "dx2 += dy", "pass"),
        ("TransformerBlock: a later gradient", "attn1_back(dx1, grads)", "attn1_back(dx2, grads)"),
        (
            "SpatialTransformer: dcontext of the first block only",
            "dcontext = plus(dcontext, dblock_context)",
            "dcontext = dblock_context",
        ),
        (
            "SpatialTransformer: gradient around lost",
            "dx += dy\n            return dx, dcontext",
            "return dx, dcontext",
        ),
        (
            "SpatialAttention: gradient around lost",
            "dx += dy\n            return dx\n",
            "return dx\n",
        ),
        ("AttentionPool: 1/l lost", "return dx + mean_back(dmean)", "return dx + dmean"),
        (
            "AttentionPool: the mean as a token forgotten",
            "position_back(dmean + q_back(dq, grads), grads)",
            "position_back(q_back(dq, grads), grads)",
        ),
    ],
    "tinyldm.models.levels": [
        ("skips of one level: in reverse", "dskips.insert(0, dskip)", "dskips.append(dskip)"),
        (
            "skips of one level: from the wrong end",
            "layer_back(dy + dskips.pop(), grads)",
            "layer_back(dy + dskips.pop(0), grads)",
        ),
        (
            "skips: one lost after downsampling",
            "dy = down_back(dy + dskips.pop(), grads)",
            "dy = down_back(dy + 0 * dskips.pop(), grads)",
        ),
        ("skips: swapped with the features", "dy, dskip = join_back", "dskip, dy = join_back"),
        (
            "context: of the first layer only",
            "dskips.insert(0, dskip)\n"
            "                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)",
            "dskips.insert(0, dskip)\n                dtime, dcontext = plus(dtime, dt), dc",
        ),
        (
            "skips of one level: dtime of the first layer only",
            "layer_back(dy + dskips.pop(), grads)\n"
            "                dtime, dcontext = plus(dtime, dt),",
            "layer_back(dy + dskips.pop(), grads)\n                dtime, dcontext = dt,",
        ),
        (
            "middle: of its last layer only",
            "dy, dt, dc = layer_back(dy, grads)\n            dtime, dcontext = plus(dtime, dt),",
            "dy, dt, dc = layer_back(dy, grads)\n            dtime, dcontext = plus(None, dt),",
        ),
    ],
    "tinyldm.models.unet": [
        (
            "skips of one level: taken in the wrong order",
            "dskips += reversed(dtaken)",
            "dskips += dtaken",
        ),
        ("skips: first one lost", "in_back(dh + dskips.pop(), grads)", "in_back(dh, grads)"),
        (
            "middle: dtime lost",
            "dh, dt, dc = mid_back(dh, grads)",
            "(dh, _, dc), dt = mid_back(dh, grads), None",
        ),
        (
            "context: of the last block only",
            "dskips += reversed(dtaken)\n"
            "                dtime, dcontext = plus(dtime, dt), plus(dcontext, dc)",
            "dskips += reversed(dtaken)\n                dtime, dcontext = plus(dtime, dt), None",
        ),
        ("labels: forgotten", "label_back(dtime, grads)", "pass"),
        (
            "pooled text: dcontext forgotten",
            "return dx, plus(dcontext, time_back(dtime, grads))",
            "time_back(dtime, grads)\n            return dx, dcontext",
        ),
        ("skips: last activation of the time forgotten", "dtime = time_back(dtime)\n", "pass\n"),
        (
            "labels: activation of the time forgotten",
            "back_1(silu_back(back_2(dtime, grads)), grads)",
            "back_1(back_2(dtime, grads), grads)",
        ),
    ],
    "tinyldm.models.autoencoder": [
        ("gaussians: ½ lost", "0.5 * dz * spread * inside", "dz * spread * inside"),
        ("gaussians: clamp forgotten in z", "dz * spread * inside", "dz * spread"),
        ("gaussians: clamp forgotten in KL", "dlogvar * inside]", "dlogvar]"),
        ("gaussians: mean and log-variance swapped", "[dz, dlogvar]", "[dlogvar, dz]"),
        ("sample: KL forgotten", "sample_back(dz) + kl_back(dkl / size)", "sample_back(dz)"),
        ("sample: KL of all latents", "kl_back(dkl / size)", "kl_back(dkl)"),
        ("draw: noise lost", "encode_back(sample_back(dz), grads)", "encode_back(moments, grads)"),
    ],
    "tinyldm.models.coders": [
        (
            "coders: convolution forgotten",
            "dh = quant_back(dfeatures, grads) if self.quant else dfeatures",
            "dh = dfeatures",
        ),
        (
            "coders: second convolution forgotten",
            "return quant_back(dz, grads) if self.post_quant else dz",
            "return dz",
        ),
        (
            "coders: last convolution has no gradient",
            "features_back(conv_back(dimages, grads), grads)",
            "features_back(conv_back(dimages, None), grads)",
        ),
        ("coders: scale lost", "draw_back(dlatents * scale, grads)", "draw_back(dlatents, grads)"),
        (
            "coders: scale upside down",
            "decode_back(dimages, grads) * scale",
            "decode_back(dimages, grads) / scale",
        ),
    ],
    "tinyldm.models.classifier": [
        (
            "classifier: of the last attribute only",
            "dpooled = plus(dpooled, head_back(dy, grads))",
            "dpooled = head_back(dy, grads)",
        ),
        (
            "classifier: of the coarsest level only",
            "dh = plus(dh, dy)",
            "dh = dy if dh is None else dh",
        ),
        ("classifier: block forgotten", "dh = resnet_back(dh, grads)", "pass"),
    ],
    "tinyldm.models.vq": [
        ("vq sample: codebook loss forgotten", "dz + loss_back(dloss, grads)", "dz"),
        ("vq: codebook forgotten", "add_grad(grads, self.weight, dcodebook)", "pass"),
    ],
    "tinyldm.models.discriminator": [
        ("discriminator: first activation forgotten", "first_bend_back(dx)", "dx"),
        (
            "discriminator: activation forgotten",
            "norm_back(bend_back(dx), grads)",
            "norm_back(dx, grads)",
        ),
        ("discriminator: norm forgotten", "norm_back(bend_back(dx), grads)", "bend_back(dx)"),
    ],
    "tinyldm.training.losses": [
        (
            "first stage: penalty has weight 1",
            "sample_back(dz, weight, grads)",
            "sample_back(dz, 1.0, grads)",
        ),
        (
            "first stage: penalty forgotten",
            "sample_back(dz, weight, grads)",
            "sample_back(dz, 0.0, grads)",
        ),
        ("perceptual: channels forgotten", "error_back(c * dloss)", "error_back(dloss)"),
        ("perceptual: weight forgotten", "perceived_back(weight)", "perceived_back()"),
        (
            "perceptual: norm forgotten",
            "norm_back(error_back(c * dloss)[0])",
            "error_back(c * dloss)[0]",
        ),
        (
            "perceptual: gradient of the target",
            "error_back(c * dloss)[0]",
            "error_back(c * dloss)[1]",
        ),
        ("perceptual: error forgotten", "return error_back(grads) + (", "return ("),
    ],
    "tinyldm.training.adversarial": [
        ("adversarial: adversarial part forgotten", " + logits_back(adversarial_back(), None)", ""),
        (
            "adversarial: the discriminator moves too",
            "error_back(grads) + logits_back(adversarial_back(), None)",
            "error_back(grads) + logits_back(adversarial_back(), grads)",
        ),
        ("adversarial: real images forgotten", "real_back(dreal, grads)", "pass"),
        ("adversarial: reconstructions forgotten", "fake_back(dfake, grads)", "pass"),
        (
            "adversarial: real and fake swapped",
            "dreal, dfake = hinge_back()",
            "dfake, dreal = hinge_back()",
        ),
    ],
    "tinyldm.nn.quantize": [
        (
            "codebook_loss: sign",
            "e - z.real, z - e.real",
            "e - z.real, e - z",
        ),
        (
            "codebook_loss: commitment lost",
            "(2 * commitment / z.size) * dloss",
            "(2 / z.size) * dloss",
        ),
        ("codebook_loss: factor", "embedding_back((2 / z.size)", "embedding_back((1 / z.size)"),
        ("straight_through: not straight", "        return dy\n", "        return 2 * dy\n"),
    ],
    "tinyldm.models.text_encoder": [
        ("text encoder: gradient around lost", "dx1 = dy + norm2_back", "dx1 = norm2_back"),
        ("text encoder: a later gradient", "return dx1 + norm1_back", "return dy + norm1_back"),
        ("text encoder: layers in order", "in reversed(layer_backs)", "in layer_backs"),
        (
            "text encoder: tokens forgotten",
            "token_back(position_back(dx, grads), grads)",
            "position_back(dx, grads)",
        ),
    ],
}
TABLE = [(name, *fault) for name, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(
    "name, key", [(name, key) for name, keys in MODULES.items() for key in keys], ids=str
)
def test_the_source_passes(name, key):
    CHECKS[key](plant(name))


@pytest.mark.parametrize("name, title, old, new", TABLE, ids=[title for _, title, *_ in TABLE])
def test_the_fault_is_found(name, title, old, new):
    with pytest.raises(GradientError):
        CHECKS[title.partition(": ")[0]](with_fault(name, old, new))


def test_every_check_is_used():
    assert {key for keys in MODULES.values() for key in keys} == CHECKS.keys()
