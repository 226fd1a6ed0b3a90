/**
 * The cells of a sheet: how they are laid out, and what is shown in each while it waits, is made and is done.
 */

import { stateText } from "./cards.js";
import { element, imageElement, removeImages } from "./elements.js";
import { readingOf, wordShown } from "./model.js";
import { columnsFor, valuesOf } from "./sheet.js";
import { t } from "./texts.js";
import { unreadWords, verdictElement } from "./verdict.js";

/**
 * @typedef {import("./queue.js").Job} Job
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./sheet.js").SheetPlace} SheetPlace
 * @typedef {import("./sheets.js").Actions} Actions
 * @typedef {import("./sheets.js").Cell} Cell
 */

/** @type {import("./queue.js").State[]} */
export const OVER = ["failed", "cancelled", "interrupted"];

/**
 * @param {SheetPlace["axes"]} axes
 * @param {HTMLElement[]} frames of the cells
 * @returns {HTMLElement}
 */
export function cellsOf([rows, columns], frames) {
  return columns ? tableOf(rows, columns, frames) : rows ? labelledOf(rows, frames) : listOf(frames);
}

/**
 * @param {import("./sheet.js").Axis} rows
 * @param {import("./sheet.js").Axis} columns
 * @param {HTMLElement[]} frames
 */
function tableOf(rows, columns, frames) {
  const width = columns.values.length;
  const heads = columns.values.map((value) => element("th", { scope: "col", text: wordShown(value) }));
  const lines = rows.values.map((value, row) => {
    const cells = frames.slice(row * width, (row + 1) * width).map((frame) => element("td", {}, frame));
    return element("tr", {}, element("th", { scope: "row", text: wordShown(value) }), ...cells);
  });
  const corner = element("td", {});
  const table = element(
    "table",
    { class: "sheet-table" },
    element("thead", {}, element("tr", {}, corner, ...heads)),
    element("tbody", {}, ...lines),
  );
  const label = `${wordShown(rows.attribute)} × ${wordShown(columns.attribute)}`;
  return element("div", { class: "sheet-scroll", tabindex: 0, role: "region", "aria-label": label }, table);
}

/**
 * @param {import("./sheet.js").Axis} rows
 * @param {HTMLElement[]} frames
 */
function labelledOf(rows, frames) {
  const items = frames.map((frame, cell) =>
    element("li", {}, frame, element("p", { class: "cell-label", text: wordShown(rows.values[cell]) })),
  );
  return element("ul", { class: "sheet-cells", style: { "--columns": String(columnsFor(frames.length)) } }, ...items);
}

/** @param {HTMLElement[]} frames */
function listOf(frames) {
  return element("ol", { class: "sheet-list" }, ...frames.map((frame) => element("li", {}, frame)));
}

/**
 * @param {Cell} cell
 * @param {Actions} actions
 */
export function showCell(cell, actions) {
  const { frame, job, generation } = cell;
  const request = (generation ?? job)?.request;
  if (!request?.sheet) return;
  const isList = request.sheet.axes.length === 0;
  const focused = frame.contains(document.activeElement);
  removeImages(frame);
  frame.className = `cell ${generation ? "done" : (job?.state ?? "")}`;
  if (isList) frame.append(captionOf(request.caption, generation));
  if (generation) frame.append(isList ? imagesOf(generation, actions) : imageOf(generation, 0, actions));
  else if (job) frame.append(stateOf(job));
  if (focused) /** @type {HTMLElement|null} */ (frame.querySelector("button"))?.focus();
}

/**
 * @param {string} caption
 * @param {Generation|null} generation
 */
function captionOf(caption, generation) {
  const unread = generation ? unreadWords(generation) : "";
  return element(
    "div",
    { class: "cell-caption" },
    element("p", { text: caption }),
    readingOf(caption),
    unread ? element("p", { class: "warning", text: unread }) : null,
  );
}

/**
 * @param {Generation} generation
 * @param {Actions} actions
 */
function imagesOf(generation, actions) {
  const shown = generation.images.flatMap((each, index) => (each.isShown ? [index] : []));
  const items = shown.map((index) => {
    const verdict = verdictElement(generation, generation.images[index]);
    return element("li", {}, imageOf(generation, index, actions), verdict);
  });
  return element("ul", { class: "cell-images" }, ...items);
}

/**
 * @param {Generation} generation
 * @param {number} index
 * @param {Actions} actions
 */
function imageOf(generation, index, actions) {
  const { request, images, id } = generation;
  const at = /** @type {SheetPlace} */ (request.sheet);
  const values = valuesOf(at, at.cell).map(wordShown).join(" · ");
  const alt = values || t("image.alt", { caption: request.caption, rank: images[index].rank });
  return element(
    "button",
    {
      type: "button",
      class: "image",
      "data-action": `open-${id}-${index}`,
      "aria-label": t("image.open", { alt }),
      on: { click: () => actions.open(generation, index) },
    },
    imageElement(images[index].blob, alt),
  );
}

/**
 * What there is of a cell that is not done: its preview and progress, or why it waits.
 * @param {Job} job
 */
function stateOf(job) {
  const isGenerating = job.state === "generating";
  const text = isGenerating ? "" : [...OVER, "waiting"].includes(job.state) ? t(`sheet.${job.state}`) : stateText(job);
  const bar = isGenerating ? element("progress", { max: 1, "aria-label": t("card.progress") }) : null;
  return element("div", { class: "blank" }, element("span", { class: "preview", text }), bar);
}

/**
 * @param {HTMLElement} frame
 * @param {Job} job
 */
export function showProgress(frame, job) {
  const bar = frame.querySelector("progress");
  if (bar && job.tokensTotal) bar.value = job.tokensGenerated / job.tokensTotal;
}

/**
 * @param {HTMLElement} frame
 * @param {Job} job
 */
export function showWait(frame, job) {
  const shown = frame.querySelector(".preview");
  if (shown) shown.textContent = stateText(job);
}

/**
 * The first candidate's latest preview, in place of the one before once it can be painted.
 * @param {HTMLElement} frame
 * @param {Job} job
 */
export function showPreview(frame, job) {
  const shown = frame.querySelector(".preview");
  const preview = job.previews.get(0);
  if (!shown || !preview) return;
  const image = imageElement(preview.blob, t("card.preview", { n: 1 }));
  const drop = () => URL.revokeObjectURL(image.src);
  image.decode().then(() => {
    if (!shown.isConnected || job.previews.get(0) !== preview) return drop();
    removeImages(shown);
    shown.append(image);
  }, drop);
}
