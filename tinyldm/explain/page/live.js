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
  image.data.forEach((_, i) => {
    const k = i % 4, value = pixels.data[(i >> 2) * pixels.c + Math.min(k, pixels.c - 1)];
    image.data[i] = k === 3 ? 255 : Math.round((value + 1) * 127.5);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Say which words no caption had, and where the caption is cut.
function check() {
  const prompt = control("prompt").value, words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
  const unknown = model.words ? words.filter((word) => !model.words.includes(word)) : [];
  const said = unknown.length ? [`No caption of training had: ${unknown.join(", ")}.`] : [];
  const room = model.tokenizer.length - 2, tokens = model.tokenizer.classes ? 0 : encode(prompt).length;
  if (tokens > room) said.push(`It is cut after ${room} of ${tokens} tokens.`);
  if (control("unknown").textContent !== said.join(" ")) control("unknown").textContent = said.join(" ");
}

// Give the page time to draw and to listen.
const rest = () => new Promise((resolve) => setTimeout(resolve));

async function generate() {
  const mine = ++run, began = performance.now(), prompt = control("prompt").value;
  const steps = Number(control("steps").value), asked = prompt || model.nothing;
  const seconds = () => ((performance.now() - began) / 1000).toFixed(1);
  check();
  control("stop").hidden = false;
  strip.replaceChildren();
  status.textContent = `Started: ${steps} steps`;
  guess.scrollIntoView({ block: "nearest" });
  await rest();
  const each = async (x, x0, i) => {
    await rest();
    if (mine !== run) throw new Error("stopped");
    const [item, small] = ["li", "canvas"].map((tag) => document.createElement(tag)), pixels = decode(x0);
    for (const canvas of [guess, small]) draw(canvas, pixels);
    Object.assign(small, { role: "img", ariaLabel: `guess at step ${i + 1}` });
    item.append(small, `t = ${model.levels[steps][i][0]}`);
    strip.append(item);
    guess.setAttribute("aria-label", `${asked}, after ${i + 1} of ${steps} steps`);
    control("progress").value = (i + 1) / steps;
    if ((4 * (i + 1)) % steps < 4) status.textContent = `Step ${i + 1} of ${steps}, ${seconds()} s`;
    await rest();
    if (mine !== run) throw new Error("stopped");
  };
  const guidance = Number(control("guidance").value), noise = noiseOf(Number(control("seed").value));
  const x = await ddim(prompt, noise, steps, guidance, each);
  draw(guess, decode(x));
  guess.setAttribute("aria-label", `image of: ${asked}`);
  status.textContent = `Done: image of “${asked}”, ${steps} steps in ${seconds()} s.`;
  control("stop").hidden = true;
}

function stop() {
  run++;
  [status.textContent, control("stop").hidden] = ["Stopped.", true];
  control("start").focus();
}

control("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate().catch((error) => {
    if (error.message === "stopped") return;
    [status.textContent, control("stop").hidden] = [`This went wrong: ${error.message}`, true];
  });
});
control("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !control("stop").hidden) stop();
});
control("prompt").addEventListener("change", check);
control("guidance").addEventListener("input", () => {
  control("guidance-value").textContent = control("guidance").value;
});
for (const e of document.querySelectorAll("[data-only]")) e.hidden = !model.has.includes(e.dataset.only);
for (const caption of model.captions) control("captions").append(new Option(caption, caption));
control("prompt").value = model.captions[0];
for (const n in model.levels) control("steps").append(new Option(n, n, n === "10", n === "10"));
control("vocabulary").hidden = !(control("words").textContent = (model.words || []).join(" "));
control("guidance").value = model.guidance;
control("guidance-value").textContent = control("guidance").value;
