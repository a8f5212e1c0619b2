"use strict";
// Binds the controls of the page to its images and texts. What a tile shows is said by attributes:
// data-sheet, a sheet of images; data-row and data-column, the controls whose values count there,
// the last one fastest, or constants as "2/5": the third of five.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The value of a control, or of a constant, and how many values there are.
function valueOf(name) {
  if (name.includes("/")) return name.split("/").map(Number);
  const control = byId(name);
  if (control.tagName === "SELECT") return [control.selectedIndex, control.length];
  return [Number(control.value), Number(control.max) + 1];
}

function place(names = "") {
  let index = 0;
  for (const name of names.split(" ").filter(Boolean)) {
    const [value, count] = valueOf(name);
    index = index * count + value;
  }
  return index;
}

function update() {
  for (const slider of all("input[data-values]")) {
    slider.setAttribute("aria-valuetext", data.texts[slider.dataset.values][slider.value] || "");
  }
  for (const text of all("[data-text]")) {
    const words = (data.texts[text.dataset.text] || [])[place(text.dataset.at)] || "";
    if (text.textContent !== words) text.textContent = words; // what stays is not read aloud again
  }
  for (const tile of all(".tile[data-sheet]")) show(tile);
  const step = byId("training-step");
  if (data.texts["training-sheets"].length) {
    byId("training-sheet").src = data.texts["training-sheets"][step.value];
    const right = (data.texts["training-right"] || [])[step.value] || "";
    byId("training-sheet").alt = `samples at ${step.getAttribute("aria-valuetext")}; ${right}`;
  }
}

function show(tile) {
  const { sheet: name, row = "", column = "" } = tile.dataset;
  const sheet = data.sheets[name];
  if (!sheet) return void (tile.parentElement.hidden = true);
  if (tile.dataset.drawn !== name) {
    tile.style.backgroundImage = `url(${sheet.src})`;
    tile.style.backgroundSize = `${100 * sheet.across}% ${100 * sheet.down}%`;
    tile.style.aspectRatio = `${sheet.w} / ${sheet.h}`;
    tile.setAttribute("role", "img");
    tile.dataset.drawn = name;
  }
  const part = (index, count) => (count > 1 ? (100 * index) / (count - 1) : 0);
  const at = place(row) * sheet.columns + place(column);
  const x = part(at % sheet.across, sheet.across), y = part(Math.floor(at / sheet.across), sheet.down);
  tile.style.backgroundPosition = `${x}% ${y}%`;
  tile.setAttribute("aria-label", sheet.words[sheet.said[at]]);
}

function tile(sheet, row, column, ...caption) {
  const image = element("div", { className: "tile" });
  Object.assign(image.dataset, { sheet, row, column });
  return element("figure", {}, image, element("figcaption", {}, ...caption));
}

// One map for each token of the chosen caption.
function wordMaps() {
  const words = (data.texts["attention-words"] || [])[place("attention-prompt")] || [];
  const guess = tile("watch-guided", "attention-prompt", "attention-step", "the guess that is taken");
  byId("attention-maps").replaceChildren(guess, ...words.map((word, i) => {
    const at = `attention-prompt attention-layer ${i}/${words.length}`, share = element("span");
    const row = `attention-prompt attention-layer attention-scale ${i}/${words.length}`;
    Object.assign(share.dataset, { text: "attention-most", at: `${at} attention-step` });
    return tile("attention", row, "attention-step", word || "(padding)", element("br"), share);
  }));
}

function list(id, count, make) {
  byId(id).replaceChildren(...Array.from({ length: count }, (_, i) => make(i)));
}

// The blocks of each network under a heading; their sources appear when they are opened.
function blocks() {
  const found = data.texts.blocks, total = found.reduce((sum, block) => sum + block.ms, 0);
  const parts = [];
  for (const network of new Set(found.map((block) => block.network))) {
    const own = found.filter((block) => block.network === network);
    const [size, time] = ["parameters", "ms"].map((key) => own.reduce((sum, block) => sum + block[key], 0));
    const facts = `${size.toLocaleString("en")} parameters, ${time.toFixed(1)} ms`;
    parts.push(element("h3", {}, `${network[0].toUpperCase()}${network.slice(1)}: ${facts}`));
    for (const { name, kind, shapes, parameters, ms } of own) {
      const made = element("details", {}, element("summary", {}, element("span", { className: "block" },
        element("code", {}, name), element("span", { className: "facts" }, shapes),
        element("span", { className: "facts number" }, parameters.toLocaleString("en")),
        element("span", { className: "facts number" }, `${ms.toFixed(2)} ms, ${Math.round((100 * ms) / total)} %`))));
      made.addEventListener("toggle", () => {
        const source = element("pre", { tabIndex: 0, role: "region" }, element("code", {}, data.texts.sources[kind]));
        source.setAttribute("aria-label", `source of ${kind}`);
        made.append(source);
      }, { once: true });
      parts.push(made);
    }
  }
  byId("blocks").replaceChildren(...parts);
}

// Move a slider to its end, once, or until the button is pressed again.
let playing = null;

function play(button) {
  const slider = byId(button.dataset.plays);
  if (playing) clearInterval(playing);
  [playing, button.textContent] = playing ? [null, "Play"] : [setInterval(step, 220), "Stop"];
  if (playing && slider.value === slider.max) slider.value = 0;

  function step() {
    slider.stepUp();
    update();
    if (slider.value === slider.max) play(button);
  }
}

// The option that is chosen at first: an index, the last, or one that the data name.
function chosen(which = "0", count) {
  return which === "last" ? count - 1 : Number((data.texts[which] || [which])[0]);
}

for (const name of data.texts.leftOut) {
  byId(name).hidden = true;
  document.querySelector(`nav a[href="#${name}"]`).hidden = true;
}
for (const part of all("[data-only]")) part.hidden = !data.texts.has.includes(part.dataset.only);
for (const select of all("select[data-options]")) {
  const options = data.texts[select.dataset.options] || [""];
  select.replaceChildren(...options.map((text) => new Option(text, text)));
  select.selectedIndex = Math.min(chosen(select.dataset.chosen, options.length), options.length - 1);
  const row = select.closest("[data-if]");
  if (row) row.hidden = options.length === 1 && !options[0];
}
for (const slider of all("input[data-values]")) {
  const count = (data.texts[slider.dataset.values] || [""]).length;
  Object.assign(slider, { min: 0, max: count - 1, step: 1, value: 0 });
}
for (const figure of all("[data-plot]")) {
  figure.hidden = !(figure.dataset.plot in data.plots); // there is nothing to plot
  figure.innerHTML = data.plots[figure.dataset.plot] ||
    "<figcaption>This curve is left out, as matplotlib is not installed: pip install matplotlib, then tinyldm explain again.</figcaption>";
}
for (const button of all("[data-plays]")) {
  button.addEventListener("click", () => play(button));
}
const texts = data.texts;
list("latents-channels", texts["latents-channel-names"].length, (i) =>
  tile("latents-channels", "latents-image", `${i}/${texts["latents-channel-names"].length}`, texts["latents-channel-names"][i]));
list("latents-random", data.sheets["latents-random"].rows, (i) =>
  tile("latents-random", `${i}/${data.sheets["latents-random"].rows}`, "", "decoded noise"));
const pairs = texts["copies-distance"].length;
list("copies-pairs", pairs, (i) => {
  return element("div", { className: "pair" }, tile("copies-generated", `${i}/${pairs}`, "", `generated: ${texts["copies-prompts"][i]}`),
    tile("copies-nearest", `${i}/${pairs}`, "", `nearest in training, ${texts["copies-distance"][i]} away`));
});
blocks();
wordMaps();
update();
document.addEventListener("input", (event) => {
  if (event.target.id === "attention-prompt") wordMaps();
  update();
});
