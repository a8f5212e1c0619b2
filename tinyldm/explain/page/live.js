"use strict";
// The page around the networks: what is asked for, and the images that come of it.

const control = (id) => document.getElementById(id);
const guess = control("guess"), strip = control("strip"), status = control("status");
let run = 0; // a newer one ends the older

// Standard normal noise of a seed (mulberry32, then Box and Muller).
function noiseOf(seed) {
  const x = features(model.size.h, model.size.w, model.size.c);
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let z = Math.imul(seed ^ (seed >>> 15), seed | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return (((z ^ (z >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  return map(x, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

function draw(canvas, pixels) {
  [canvas.width, canvas.height] = [pixels.w, pixels.h];
  const image = new ImageData(pixels.w, pixels.h);
  for (let i = 0; i < pixels.w * pixels.h; i++) {
    for (let k = 0; k < 4; k++) {
      const value = pixels.data[i * pixels.c + Math.min(k, pixels.c - 1)];
      image.data[4 * i + k] = k === 3 ? 255 : Math.round((value + 1) * 127.5);
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Name the words of a prompt that no caption had.
function unknownWords(prompt) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
  return model.words ? words.filter((word) => !model.words.includes(word)) : [];
}

async function generate() {
  const mine = ++run, began = performance.now();
  const prompt = control("prompt").value, steps = Number(control("steps").value);
  const unknown = unknownWords(prompt);
  control("unknown").textContent = unknown.length ? `No caption had: ${unknown.join(", ")}.` : "";
  strip.replaceChildren();
  const each = async (x, x0, i) => {
    if (mine !== run) throw new Error("replaced");
    const pixels = decode(x0), seconds = (performance.now() - began) / 1000;
    const item = document.createElement("li"), small = document.createElement("canvas");
    draw(guess, pixels);
    draw(small, pixels);
    item.append(small, `t = ${model.levels[steps][i][0]}`);
    strip.append(item);
    guess.setAttribute("aria-label", `${prompt}, after ${i + 1} of ${steps} steps`);
    status.textContent = `Step ${i + 1} of ${steps}, ${seconds.toFixed(1)} s`;
    control("progress").value = (i + 1) / steps;
    await new Promise((resolve) => setTimeout(resolve)); // so that the page is drawn
  };
  const guidance = Number(control("guidance").value);
  const x = await ddim(prompt, noiseOf(Number(control("seed").value)), steps, guidance, each);
  draw(guess, decode(x));
  status.textContent = `Done: ${steps} steps in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
}

control("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate().catch((error) => {
    if (error.message !== "replaced") status.textContent = `This went wrong: ${error.message}`;
  });
});
control("guidance").addEventListener("input", () => {
  control("guidance-value").textContent = control("guidance").value;
});
for (const caption of model.captions) control("captions").append(new Option(caption, caption));
control("prompt").value = model.captions[0];
control("steps").replaceChildren(...Object.keys(model.levels).map((n) => new Option(n, n, n === "10", n === "10")));
control("guidance").value = control("guidance-value").textContent = model.guidance;
