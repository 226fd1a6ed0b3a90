/**
 * Two to four images compared: side by side, or two on top of each other with a border that is moved by a slider; beneath,
 * what differs in their captions and settings.
 */

import { button, byId, element, fillDialog, imageElement } from "./elements.js";
import { inLanguageShown } from "./model.js";
import { formatNumber, formatScore, t } from "./texts.js";

const LETTERS = "ABCD";
const NO_VALUE = "–";

/**
 * @typedef {import("./library.js").Picture} Picture
 * @typedef {import("./store.js").Generation} Generation
 *
 * @typedef {object} Compared
 * @property {Blob} blob
 * @property {string} name beside its letter
 * @property {[string, string][]} facts what made it: names and values
 *
 * @typedef {{view: "beside"|"over", left: number, right: number, share: number}} State `share`: of the left one, in percent
 */

/**
 * @param {Picture[]} pictures two to four
 */
export function comparePictures(pictures) {
  const compared = pictures.map(({ generation, image }) => ({
    blob: image.blob,
    name: t("compare.name", { rank: image.rank, seed: generation.request.seed }),
    facts: factsOf({ generation, image }),
  }));
  openCompare(compared, "beside");
}

/**
 * An image that was generated from another, beside that one.
 * @param {Generation} generation its request has an init image
 * @param {number} index
 */
export function compareWithSource(generation, index) {
  const source = generation.request.image;
  const image = generation.images[index];
  if (!source) return;
  const name = t("image.rank", { rank: image.rank });
  openCompare(
    [
      { blob: source, name: t("source.name"), facts: [] },
      { blob: image.blob, name, facts: [] },
    ],
    "over",
    t(`kind.${generation.request.kind}`),
  );
}

/**
 * @param {Compared[]} compared
 * @param {State["view"]} view to begin with
 * @param {string} [note] in place of what differs
 */
function openCompare(compared, view, note) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("compare"));
  /** @type {State} */
  const state = { view, left: 0, right: 1, share: 50 };
  const frame = element("div", { class: "compare-frame" });
  const show = () => {
    for (const image of frame.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    frame.replaceChildren(...(state.view === "beside" ? compared.map(besideElement) : overElements(compared, state, show)));
    frame.className = `compare-frame ${state.view === "over" ? "overlaid" : "beside"}`;
  };
  const body = element(
    "div",
    { class: "compare-body" },
    element(
      "header",
      { class: "dialog-head" },
      element("h2", { id: "compare-title", text: t("compare.title") }),
      viewChoice(state, show),
      button({ icon: "close", label: t("close"), class: "quiet icon-only", press: () => dialog.close() }),
    ),
    frame,
    note ? element("p", { class: "compare-note", text: note }) : differencesOf(compared),
  );
  fillDialog("compare", body);
  show();
  dialog.addEventListener("close", () => fillDialog("compare", element("div")), { once: true });
  dialog.showModal();
  /** @type {HTMLElement|null} */ (dialog.querySelector("input[name='compare-view']:checked"))?.focus();
}

/**
 * @param {State} state
 * @param {() => void} show
 */
function viewChoice(state, show) {
  /** @param {State["view"]} value */
  const option = (value) => {
    const change = () => {
      state.view = value;
      show();
    };
    const checked = state.view === value;
    const input = element("input", { type: "radio", name: "compare-view", value, checked, on: { change } });
    return element("label", { class: "segment" }, input, element("span", { text: t(`compare.${value}`) }));
  };
  return element(
    "fieldset",
    { class: "segments" },
    element("legend", { class: "visually-hidden", text: t("compare.view") }),
    option("beside"),
    option("over"),
  );
}

/**
 * @param {Compared} compared
 * @param {number} index
 */
function besideElement({ blob, name }, index) {
  const label = letter(index);
  return element(
    "figure",
    {},
    element("div", { class: "image" }, imageElement(blob, t("compare.alt", { letter: label, name }))),
    element("figcaption", {}, element("b", { text: label }), " ", name),
  );
}

/**
 * Two images on top of each other: the left one is shown left of the border, the right one right of it.
 * @param {Compared[]} compared
 * @param {State} state
 * @param {() => void} show
 * @returns {HTMLElement[]}
 */
function overElements(compared, state, show) {
  const [left, right] = [compared[state.left], compared[state.right]];
  const alt = (/** @type {number} */ index) => t("compare.alt", { letter: letter(index), name: compared[index].name });
  const over = element("div", { class: "upper" }, imageElement(left.blob, alt(state.left)));
  const stack = element("div", { class: "image stack" }, imageElement(right.blob, alt(state.right)), over);
  const slider = element("input", { id: "compare-border", type: "range", min: 0, max: 100, step: 1, value: state.share });
  const move = () => {
    state.share = Number(slider.value);
    stack.style.setProperty("--share", `${state.share}%`);
    slider.setAttribute(
      "aria-valuetext",
      t("compare.border_at", { left: left.name, share: state.share, right: right.name, rest: 100 - state.share }),
    );
  };
  slider.addEventListener("input", move);
  /** @param {PointerEvent} event */
  const drag = (event) => {
    if (event.type === "pointerdown") stack.setPointerCapture(event.pointerId);
    else if (!stack.hasPointerCapture(event.pointerId)) return;
    const box = stack.getBoundingClientRect();
    slider.value = String(Math.round(((event.clientX - box.left) / box.width) * 100));
    move();
  };
  stack.addEventListener("pointerdown", drag);
  stack.addEventListener("pointermove", drag);
  move();
  const ends = element(
    "div",
    { class: "compare-ends" },
    endOf(compared, state, "left", show),
    endOf(compared, state, "right", show),
  );
  return [
    stack,
    element("div", { class: "field" }, element("label", { for: "compare-border", text: t("compare.border") }), slider),
    ends,
  ];
}

/**
 * The name of the image on one side; with more than two, a choice.
 * @param {Compared[]} compared
 * @param {State} state
 * @param {"left"|"right"} side
 * @param {() => void} show
 */
function endOf(compared, state, side, show) {
  const other = side === "left" ? state.right : state.left;
  const names = compared.map(({ name }, index) => `${letter(index)} ${name}`);
  if (compared.length === 2) return element("span", { text: names[state[side]] });
  const options = names.map((name, index) =>
    element("option", { value: index, text: name, selected: index === state[side], disabled: index === other }),
  );
  const select = element("select", { "aria-label": t(`compare.${side}`), id: `compare-${side}` }, ...options);
  select.addEventListener("change", () => {
    state[side] = Number(select.value);
    show();
    byId(select.id).focus();
  });
  return select;
}

// --------------------------------------------------------------------------------------------------- what differs

/**
 * @param {Picture} picture
 * @returns {[string, string][]}
 */
function factsOf({ generation, image }) {
  const { request } = generation;
  const any = t("settings.all");
  return [
    [t("caption.label"), inLanguageShown(request.caption) || request.caption],
    [t("settings.seed"), request.seed],
    [t("viewer.candidate"), formatNumber(image.candidate + 1)],
    [t("viewer.score"), image.score === null ? NO_VALUE : formatScore(image.score)],
    [t("settings.temperature"), formatNumber(request.temperature)],
    [t("settings.guidance"), formatNumber(request.guidance)],
    [t("settings.topK_short"), request.topK === null ? any : formatNumber(request.topK)],
    [t("settings.topP_short"), request.topP === null ? any : formatNumber(request.topP)],
    [t("viewer.kind"), request.kind === "new" ? t("compare.from_caption") : t(`kind.${request.kind}`)],
    [t("editor.keep_rows"), request.keepRows === null ? NO_VALUE : formatNumber(request.keepRows)],
    [t("viewer.model"), generation.modelId],
  ];
}

/**
 * @param {Compared[]} compared
 * @returns {HTMLElement} a table of what is not the same in all, and a line with what is
 */
function differencesOf(compared) {
  const names = compared[0].facts.map(([name]) => name);
  const valuesOf = (/** @type {number} */ row) => compared.map(({ facts }) => facts[row][1]);
  const isSame = (/** @type {number} */ row) => new Set(valuesOf(row)).size === 1;
  const rows = names.map((_, row) => row);
  const hasValue = (/** @type {number} */ row) => valuesOf(row)[0] !== NO_VALUE;
  const same = rows.filter((row) => isSame(row) && hasValue(row)).map((row) => `${names[row]}: ${valuesOf(row)[0]}`);
  const body = rows
    .filter((row) => !isSame(row))
    .map((row) => {
      const cells = valuesOf(row).map((value, _, all) => element("td", {}, ...(row === 0 ? marked(value, all) : [value])));
      return element("tr", {}, element("th", { scope: "row", text: names[row] }), ...cells);
    });
  const head = compared.map((_, index) => element("th", { scope: "col", text: letter(index) }));
  return element(
    "div",
    { class: "differences", role: "region", "aria-label": t("compare.differences"), tabindex: 0 },
    element(
      "table",
      {},
      element("caption", { text: t("compare.differences") }),
      element("thead", {}, element("tr", {}, element("td", {}), ...head)),
      element("tbody", {}, ...body),
    ),
    element("p", { class: "hint", text: t("compare.same", { facts: same.join(" · ") }) }),
  );
}

/**
 * @param {string} caption
 * @param {string[]} all captions
 * @returns {(Node|string)[]} its words; those that another caption does not have are marked
 */
function marked(caption, all) {
  const others = all.map((each) => new Set(each.split(" ")));
  return caption
    .split(" ")
    .flatMap((word) => [others.every((words) => words.has(word)) ? word : element("mark", { text: word }), " "]);
}

/** @param {number} index */
function letter(index) {
  return LETTERS[index];
}
