"use strict";
// The networks of a latent diffusion model, forward passes only, in float32. They read like the
// Python of `tinyldm/models`, and are its equal to 1e-3. Features of an image are {h, w, c, data},
// with the channels of a position side by side; tokens (l, d) are features of height 1.

const model = JSON.parse(document.getElementById("model").textContent);
const weights = unpack(document.getElementById("weights").textContent.trim());

function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const halves = new Uint16Array(bytes.buffer);
  const found = {};
  let start = 0;
  for (const [name, shape] of model.shapes) {
    const size = shape.reduce((a, b) => a * b, 1);
    found[name] = { shape, data: Float32Array.from(halves.subarray(start, start + size), half) };
    start += size;
  }
  return found;
}

// Decode the 16 bits of a float16: sign, five bits of exponent, ten of fraction (IEEE 754).
function half(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24;
  return bits >> 15 ? -size : size;
}

const has = (name) => name in weights;
const features = (h, w, c) => ({ h, w, c, data: new Float32Array(h * w * c) });
const map = (x, f) => ({ ...x, data: x.data.map(f) });
const add = (x, y) => map(x, (value, i) => value + y.data[i]);

// ------------------------------------------------------------------------------------- layers

// y = x Wᵀ + b for each position.
function linear(name, x) {
  const { shape: [out, c], data: w } = weights[`${name}.weight`];
  const bias = has(`${name}.bias`) ? weights[`${name}.bias`].data : null, y = features(x.h, x.w, out);
  for (let p = 0; p < x.h * x.w; p++) {
    for (let o = 0; o < out; o++) {
      let sum = bias ? bias[o] : 0;
      for (let i = 0; i < c; i++) sum += x.data[p * c + i] * w[o * c + i];
      y.data[p * out + o] = sum;
    }
  }
  return y;
}

// Convolution; the kernel lies as (height, width, in, out), and beyond the border there are zeros.
function conv(name, x, stride = 1) {
  const { shape: [size, , c, out], data: w } = weights[`${name}.weight`];
  const bias = weights[`${name}.bias`].data, pad = size >> 1;
  const y = features(Math.ceil(x.h / stride), Math.ceil(x.w / stride), out);
  for (let row = 0; row < y.h; row++) {
    for (let column = 0; column < y.w; column++) {
      const sum = y.data.subarray((row * y.w + column) * out, (row * y.w + column + 1) * out);
      sum.set(bias);
      for (let i = 0; i < size; i++) {
        for (let j = 0; j < size; j++) {
          const r = row * stride + i - pad, q = column * stride + j - pad;
          if (r < 0 || r >= x.h || q < 0 || q >= x.w) continue;
          for (let k = 0; k < c; k++) {
            const value = x.data[(r * x.w + q) * c + k], from = ((i * size + j) * c + k) * out;
            for (let o = 0; o < out; o++) sum[o] += value * w[from + o];
          }
        }
      }
    }
  }
  return y;
}

// Normalise `count` values of data, given by their places, to mean 0 and variance 1.
function normalise(data, count, place, eps) {
  let mean = 0, variance = 0;
  for (let i = 0; i < count; i++) mean += data[place(i)] / count;
  for (let i = 0; i < count; i++) variance += (data[place(i)] - mean) ** 2 / count;
  const scale = 1 / Math.sqrt(variance + eps);
  for (let i = 0; i < count; i++) data[place(i)] = (data[place(i)] - mean) * scale;
}

function scaleAndShift(name, x) {
  const w = weights[`${name}.weight`].data, b = weights[`${name}.bias`].data;
  return map(x, (value, i) => value * w[i % x.c] + b[i % x.c]);
}

function groupNorm(name, x, groups, eps) {
  const y = map(x, (value) => value), width = x.c / groups;
  for (let g = 0; g < groups; g++) {
    const place = (i) => Math.floor(i / width) * x.c + g * width + (i % width);
    normalise(y.data, x.h * x.w * width, place, eps);
  }
  return scaleAndShift(name, y);
}

function layerNorm(name, x, eps = 1e-5) {
  const y = map(x, (value) => value);
  for (let p = 0; p < x.h * x.w; p++) normalise(y.data, x.c, (i) => p * x.c + i, eps);
  return scaleAndShift(name, y);
}

const silu = (x) => map(x, (value) => value / (1 + Math.exp(-value)));
const quickGelu = (value) => value / (1 + Math.exp(-1.702 * value));

// GELU, x Φ(x), with the error function to 1.5e-7 (Abramowitz & Stegun, 7.1.26).
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const series = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const erf = 1 - series.reduce((sum, a) => (sum + a) * t, 0) * Math.exp(-z * z);
  return x * 0.5 * (1 + Math.sign(x) * erf);
}

// softmax(q kᵀ / √d) v of each head.
function attention(q, k, v, heads, causal = false) {
  const l = q.h * q.w, m = k.h * k.w, d = q.c / heads, y = features(q.h, q.w, v.c);
  const wide = v.c / heads, p = new Float32Array(m);
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < l; i++) {
      let most = -Infinity, total = 0;
      const last = causal ? i + 1 : m;
      for (let j = 0; j < last; j++) {
        p[j] = 0;
        for (let f = head * d; f < (head + 1) * d; f++) p[j] += q.data[i * q.c + f] * k.data[j * k.c + f];
        p[j] /= Math.sqrt(d);
        most = Math.max(most, p[j]);
      }
      for (let j = 0; j < last; j++) total += p[j] = Math.exp(p[j] - most);
      for (let j = 0; j < last; j++) {
        for (let f = head * wide; f < (head + 1) * wide; f++) {
          y.data[i * v.c + f] += (p[j] / total) * v.data[j * v.c + f];
        }
      }
    }
  }
  return y;
}

function attend(name, x, context, heads, causal = false, names = ["to_q", "to_k", "to_v", "to_out.0"]) {
  const [q, k, v, out] = names.map((part) => `${name}.${part}`);
  return linear(out, attention(linear(q, x), linear(k, context), linear(v, context), heads, causal));
}

// ------------------------------------------------------------------------------------- blocks

function resnet(name, x, time, groups, eps) {
  let h = conv(`${name}.conv1`, silu(groupNorm(`${name}.norm1`, x, groups, eps)));
  if (time) {
    const shift = linear(`${name}.time_emb_proj`, time);
    h = map(h, (value, i) => value + shift.data[i % h.c]);
  }
  h = conv(`${name}.conv2`, silu(groupNorm(`${name}.norm2`, h, groups, eps)));
  return add(h, has(`${name}.conv_shortcut.weight`) ? conv(`${name}.conv_shortcut`, x) : x);
}

function transformer(name, x, context, heads, groups) {
  const project = (part, h) => {
    const kind = weights[`${name}.${part}.weight`].shape.length === 2 ? linear : conv;
    return kind(`${name}.${part}`, h);
  };
  let h = project("proj_in", groupNorm(`${name}.norm`, x, groups, 1e-6));
  for (let i = 0; has(`${name}.transformer_blocks.${i}.norm1.weight`); i++) {
    const block = `${name}.transformer_blocks.${i}`;
    let g = layerNorm(`${block}.norm1`, h);
    h = add(h, attend(`${block}.attn1`, g, g, heads));
    g = layerNorm(`${block}.norm2`, h);
    h = add(h, attend(`${block}.attn2`, g, context || g, heads));
    const wide = linear(`${block}.ff.net.0.proj`, layerNorm(`${block}.norm3`, h));
    const d = wide.c / 2, gated = features(h.h, h.w, d);
    gated.data.forEach((_, i) => {
      const at = Math.floor(i / d) * wide.c + (i % d);
      gated.data[i] = wide.data[at] * gelu(wide.data[at + d]);
    });
    h = add(h, linear(`${block}.ff.net.2`, gated));
  }
  return add(project("proj_out", h), x);
}

// Repeat positions to the size (h, w).
function upsample(x, h, w) {
  const y = features(h, w, x.c);
  y.data.forEach((_, i) => {
    const p = Math.floor(i / x.c), row = Math.floor(p / w) >> 1, column = (p % w) >> 1;
    y.data[i] = x.data[(row * x.w + column) * x.c + (i % x.c)];
  });
  return y;
}

function concatenate(x, y) {
  const z = features(x.h, x.w, x.c + y.c);
  for (let p = 0; p < x.h * x.w; p++) {
    z.data.set(x.data.subarray(p * x.c, (p + 1) * x.c), p * z.c);
    z.data.set(y.data.subarray(p * y.c, (p + 1) * y.c), p * z.c + x.c);
  }
  return z;
}

// ----------------------------------------------------------------------------------- networks

// Token ids → hidden states (l, d); of a model of classes, an embedded class or nothing.
function embedText(ids) {
  const root = "text_encoder.text_model", c = model.text;
  if (!c) return null;
  const name = c.hidden_act ? `${root}.embeddings.token_embedding` : "text_encoder.embedding";
  const { shape: [, d], data } = weights[`${name}.weight`];
  const x = features(1, ids.length, d);
  ids.forEach((id, i) => x.data.set(data.subarray(id * d, (id + 1) * d), i * d));
  if (!c.hidden_act) return x;
  let h = map(x, (value, i) => value + weights[`${root}.embeddings.position_embedding.weight`].data[i]);
  const activation = c.hidden_act === "gelu" ? gelu : quickGelu, eps = c.layer_norm_eps;
  const names = ["q", "k", "v", "out"].map((part) => `self_attn.${part}_proj`);
  for (let i = 0; i < c.num_hidden_layers; i++) {
    const layer = `${root}.encoder.layers.${i}`;
    const g = layerNorm(`${layer}.layer_norm1`, h, eps);
    h = add(h, attend(layer, g, g, c.num_attention_heads, true, names));
    const wide = linear(`${layer}.mlp.fc1`, layerNorm(`${layer}.layer_norm2`, h, eps));
    h = add(h, linear(`${layer}.mlp.fc2`, map(wide, activation)));
  }
  return layerNorm(`${root}.final_layer_norm`, h, eps);
}

// The time step as a vector, and with it the class or a summary of the text.
function embedTime(t, context, ids) {
  const { narrowest, flip, shift, pool_heads } = model.unet, middle = narrowest >> 1;
  const waves = features(1, 1, narrowest);
  for (let i = 0; i < middle; i++) {
    const angle = t * Math.exp((-Math.log(10000) * i) / (middle - shift));
    waves.data[i] = flip ? Math.cos(angle) : Math.sin(angle);
    waves.data[middle + i] = flip ? Math.sin(angle) : Math.cos(angle);
  }
  let time = linear("unet.time_embedding.linear_2", silu(linear("unet.time_embedding.linear_1", waves)));
  if (has("unet.class_embedding.weight")) {
    const { shape: [, d], data } = weights["unet.class_embedding.weight"];
    time = map(time, (value, i) => value + data[ids[0] * d + i]);
  }
  if (has("unet.add_embedding.proj.weight")) {
    const name = "unet.add_embedding", text = layerNorm(`${name}.norm1`, context);
    let mean = features(1, 1, text.c);
    text.data.forEach((value, i) => (mean.data[i % text.c] += value / text.w));
    mean = add(mean, weights[`${name}.pool.positional_embedding`]);
    const tokens = features(1, 1 + text.w, text.c);
    tokens.data.set(mean.data);
    tokens.data.set(text.data, text.c);
    const [q, k, v] = ["q", "k", "v"].map((part) => `${name}.pool.${part}_proj`);
    const pooled = attention(linear(q, mean), linear(k, tokens), linear(v, tokens), pool_heads);
    time = add(time, layerNorm(`${name}.norm2`, linear(`${name}.proj`, pooled)));
  }
  return silu(time);
}

// Predict ε, x0 or v at the latents x and the time step t.
function unet(x, t, context, ids) {
  const { groups, eps, heads } = model.unet, time = embedTime(t, context, ids);
  const layer = (block, j, level, h) => {
    h = resnet(`${block}.resnets.${j}`, h, time, groups, eps);
    const name = `${block}.attentions.${j}`;
    return has(`${name}.norm.weight`) ? transformer(name, h, context, heads[level], groups) : h;
  };
  let h = conv("unet.conv_in", x);
  const skips = [h], levels = heads.length;
  for (let i = 0; i < levels; i++) {
    const block = `unet.down_blocks.${i}`;
    for (let j = 0; has(`${block}.resnets.${j}.conv1.weight`); j++) {
      skips.push((h = layer(block, j, i, h)));
    }
    if (i < levels - 1) skips.push((h = conv(`${block}.downsamplers.0.conv`, h, 2)));
  }
  for (let j = 0; has(`unet.mid_block.resnets.${j}.conv1.weight`); j++) {
    h = layer("unet.mid_block", j, levels - 1, h);
  }
  for (let i = 0; i < levels; i++) {
    const block = `unet.up_blocks.${i}`;
    for (let j = 0; has(`${block}.resnets.${j}.conv1.weight`); j++) {
      h = layer(block, j, levels - 1 - i, concatenate(h, skips.pop()));
    }
    if (i === levels - 1) break;
    const { h: height, w: width } = skips[skips.length - 1];
    h = conv(`${block}.upsamplers.0.conv`, upsample(h, height, width));
  }
  return conv("unet.conv_out", silu(groupNorm("unet.conv_norm_out", h, groups, eps)));
}

// Latents → pixels (h, w, channels), about −1…1.
function decode(latents) {
  const { scale, shift, groups, levels } = model.vae, eps = 1e-6;
  let h = map(latents, (value) => value / scale + shift);
  if (!has("vae.decoder.conv_in.weight")) return h; // diffusion in pixels
  if (has("vae.post_quant_conv.weight")) h = conv("vae.post_quant_conv", h);
  h = resnet("vae.decoder.mid_block.resnets.0", conv("vae.decoder.conv_in", h), null, groups, eps);
  const name = "vae.decoder.mid_block.attentions.0";
  if (has(`${name}.group_norm.weight`)) {
    const g = groupNorm(`${name}.group_norm`, h, groups, eps);
    h = add(h, attend(name, g, g, 1));
  }
  h = resnet("vae.decoder.mid_block.resnets.1", h, null, groups, eps);
  for (let i = 0; i < levels; i++) {
    const block = `vae.decoder.up_blocks.${i}`;
    for (let j = 0; has(`${block}.resnets.${j}.conv1.weight`); j++) {
      h = resnet(`${block}.resnets.${j}`, h, null, groups, eps);
    }
    if (i < levels - 1) h = conv(`${block}.upsamplers.0.conv`, upsample(h, 2 * h.h, 2 * h.w));
  }
  return conv("vae.decoder.conv_out", silu(groupNorm("vae.decoder.conv_norm_out", h, groups, eps)));
}

// DDIM with classifier-free guidance: calls `each(x, x0)` after every step (Song et al., eq. 12).
async function ddim(prompt, noise, steps, guidance, each) {
  const [ids, none] = [tokenize(prompt), tokenize("")];
  const [context, without] = [embedText(ids), embedText(none)];
  const levels = [...model.levels[steps], [null, model.final_level]];
  let x = noise;
  for (let i = 0; i < steps; i++) {
    const [t, alphaBar] = levels[i], next = levels[i + 1][1];
    let prediction = unet(x, t, context, ids);
    if (guidance !== 1) {
      await new Promise((resolve) => setTimeout(resolve)); // the page may want to do something
      const alone = unet(x, t, without, none);
      prediction = map(prediction, (value, j) => alone.data[j] + guidance * (value - alone.data[j]));
    }
    const a = Math.sqrt(alphaBar), s = Math.sqrt(1 - alphaBar);
    const x0 = map(x, (value, j) => {
      const p = prediction.data[j];
      return { epsilon: (value - s * p) / a, sample: p, v_prediction: a * value - s * p }[model.prediction];
    });
    const epsilon = map(x, (value, j) => (value - a * x0.data[j]) / s);
    x = map(x0, (value, j) => Math.sqrt(next) * value + Math.sqrt(1 - next) * epsilon.data[j]);
    await each(x, x0, i);
  }
  return x;
}

// Caption → token ids with start, end and padding; of a model of classes, the id of the class.
function tokenize(text) {
  const { length, start, end, pad, classes } = model.tokenizer;
  if (classes && !(text in classes)) throw new Error(`expected ${Object.keys(classes).slice(0, 5)}…`);
  if (classes) return [classes[text]];
  const row = [start, ...encode(text).slice(0, length - 2), end];
  return [...row, ...Array(length - row.length).fill(pad)];
}

// Caption → the ids of all its tokens, by CLIP's byte-pair encoding.
function encode(text) {
  const { vocab, merges, end } = model.tokenizer, ids = [];
  const normal = Array.from(text.normalize("NFC"), (character) => character.toLowerCase()).join("");
  const pieces = /'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
  for (const [piece] of normal.matchAll(pieces)) {
    const symbols = Array.from(new TextEncoder().encode(piece), (byte) => model.tokenizer.symbols[byte]);
    symbols[symbols.length - 1] += "</w>";
    for (;;) {
      const ranks = symbols.slice(1).map((symbol, i) => merges[`${symbols[i]} ${symbol}`] ?? Infinity);
      const least = Math.min(Infinity, ...ranks);
      if (least === Infinity) break;
      const i = ranks.indexOf(least);
      symbols.splice(i, 2, symbols[i] + symbols[i + 1]);
    }
    ids.push(...symbols.map((symbol) => vocab[symbol] ?? end));
  }
  return ids;
}
