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

// What the controls say, in words, for those who do not see the image.
function inWords(names) {
  return names.split(" ").filter((name) => name && !name.includes("/")).map((name) => {
    const control = byId(name);
    const options = control.selectedOptions;
    return options ? options[0].text : control.getAttribute("aria-valuetext");
  }).filter(Boolean);
}

function update() {
  for (const slider of all("input[data-values]")) {
    slider.setAttribute("aria-valuetext", data.texts[slider.dataset.values][slider.value] || "");
  }
  for (const text of all("[data-text]")) {
    text.textContent = (data.texts[text.dataset.text] || [])[place(text.dataset.at)] || "";
  }
  for (const tile of all(".tile[data-sheet]")) show(tile);
  const step = byId("training-step");
  if (step.max >= 0 && data.texts["training-sheets"].length) {
    byId("training-sheet").src = data.texts["training-sheets"][step.value];
    byId("training-sheet").alt = `samples from the same noise at ${step.getAttribute("aria-valuetext")}`;
  }
}

function show(tile) {
  const { sheet: name, row = "", column = "" } = tile.dataset;
  const sheet = data.sheets[name];
  if (!sheet) return void (tile.parentElement.hidden = true);
  if (tile.dataset.drawn !== name) {
    tile.style.backgroundImage = `url(${sheet.src})`;
    tile.style.backgroundSize = `${100 * sheet.columns}% ${100 * sheet.rows}%`;
    tile.style.aspectRatio = `${sheet.w} / ${sheet.h}`;
    tile.setAttribute("role", "img");
    tile.dataset.drawn = name;
  }
  const part = (index, count) => (count > 1 ? (100 * index) / (count - 1) : 0);
  const x = part(place(column), sheet.columns), y = part(place(row), sheet.rows);
  tile.style.backgroundPosition = `${x}% ${y}%`;
  const caption = tile.parentElement.querySelector("figcaption");
  const words = [caption ? caption.textContent : name, ...inWords(`${row} ${column}`)];
  tile.setAttribute("aria-label", words.join(", "));
}

function tile(sheet, row, column, ...caption) {
  const image = element("div", { className: "tile" });
  Object.assign(image.dataset, { sheet, row, column });
  return element("figure", {}, image, element("figcaption", {}, ...caption));
}

// One map for each token of the chosen caption.
function wordMaps() {
  const words = (data.texts["attention-words"] || [])[place("attention-prompt")] || [];
  byId("attention-maps").replaceChildren(...words.map((word, i) => {
    const row = `attention-prompt attention-layer ${i}/${words.length}`, share = element("span");
    Object.assign(share.dataset, { text: "attention-most", at: `${row} attention-step` });
    return tile("attention", row, "attention-step", word || "(padding)", ", ", share);
  }));
}

function list(id, count, make) {
  byId(id).replaceChildren(...Array.from({ length: count }, (_, i) => make(i)));
}

function blocks() {
  const found = data.texts.blocks, total = found.reduce((sum, block) => sum + block.ms, 0);
  list("blocks", found.length, (i) => {
    const { network, name, kind, shapes, parameters, ms } = found[i];
    const facts = `${network} · ${kind} · ${shapes} · ${parameters.toLocaleString("en")} parameters · ` +
      `${ms.toFixed(2)} ms (${((100 * ms) / total).toFixed(0)} %)`;
    const made = element("details", {}, element("summary", {},
      element("code", {}, name), " ", element("span", { className: "facts" }, facts)));
    made.addEventListener("toggle", () => {
      if (made.children.length === 1) {
        const source = element("pre", { tabIndex: 0 }, element("code", {}, data.texts.sources[kind]));
        made.append(source);
      }
    }, { once: true });
    return made;
  });
}

// Move a slider to its end, once.
function play(button) {
  const slider = byId(button.dataset.plays);
  if (Number(slider.value) === Number(slider.max)) slider.value = 0;
  const timer = setInterval(() => {
    slider.stepUp();
    update();
    if (slider.value === slider.max || button.dataset.state !== "playing") stop();
  }, 220);
  const stop = () => {
    clearInterval(timer);
    [button.textContent, button.dataset.state] = ["Play", ""];
  };
  [button.textContent, button.dataset.state] = ["Stop", "playing"];
}

// The option that is chosen at first: an index, the last, or one that the data name.
function chosen(which = "0", count) {
  return which === "last" ? count - 1 : Number((data.texts[which] || [which])[0]);
}

for (const name of data.texts.leftOut) {
  byId(name).hidden = true;
  document.querySelector(`nav a[href="#${name}"]`).hidden = true;
}
for (const select of all("select[data-options]")) {
  const options = data.texts[select.dataset.options] || [""];
  select.replaceChildren(...options.map((text) => new Option(text, text)));
  select.selectedIndex = Math.min(chosen(select.dataset.chosen, options.length), options.length - 1);
  const row = select.closest("[data-if]");
  if (row) row.hidden = options.length === 1 && !options[0];
}
for (const slider of all("input[data-values]")) {
  const count = (data.texts[slider.dataset.values] || [""]).length;
  Object.assign(slider, { min: 0, max: count - 1, step: 1, value: slider.id === "training-step" ? count - 1 : 0 });
}
for (const figure of all("[data-plot]")) {
  figure.innerHTML = data.plots[figure.dataset.plot] ||
    "<figcaption>This curve is left out, as matplotlib is not installed: pip install matplotlib, then tinyldm explain again.</figcaption>";
}
for (const button of all("[data-plays]")) {
  button.addEventListener("click", () => {
    if (button.dataset.state === "playing") button.dataset.state = "";
    else play(button);
  });
}
const texts = data.texts;
list("latents-channels", texts["latents-channel-names"].length, (i) =>
  tile("latents-channels", "latents-image", `${i}/${texts["latents-channel-names"].length}`, texts["latents-channel-names"][i]));
list("latents-random", data.sheets["latents-random"].rows, (i) =>
  tile("latents-random", `${i}/${data.sheets["latents-random"].rows}`, "", "decoded noise"));
list("copies-facts", texts["copies-facts"].length, (i) => element("li", {}, texts["copies-facts"][i]));
const pairs = texts["copies-distance"].length;
list("copies-pairs", pairs, (i) => {
  const pair = element("div", {}, tile("copies-generated", `${i}/${pairs}`, "", `generated: ${texts["copies-prompts"][i]}`),
    tile("copies-nearest", `${i}/${pairs}`, "", `nearest, ${texts["copies-distance"][i]} away`));
  return pair;
});
blocks();
wordMaps();
update();
document.addEventListener("input", (event) => {
  if (event.target.id === "attention-prompt") wordMaps();
  update();
});
