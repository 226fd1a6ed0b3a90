/**
 * Sheets on the board: one card for many requests, whose images fill its cells as they are ready.
 *
 * It is a board of its own around the other one: what belongs to no sheet passes through.
 */

import { place, whyFailed } from "./cards.js";
import { announce, button, byId, element, imageElement, removeImages } from "./elements.js";
import { readingOf, wordShown } from "./model.js";
import { saveSheet } from "./sheet_picture.js";
import { columnsFor, valuesOf } from "./sheet.js";
import { formatTime, onLanguage, t } from "./texts.js";
import { unreadWords, verdictElement } from "./verdict.js";

/**
 * @typedef {import("./queue.js").Job} Job
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./sheet.js").SheetPlace} SheetPlace
 * @typedef {import("./cards.js").Board} Board
 *
 * @typedef {Pick<import("./cards.js").Actions, "cancel"|"retry"|"useSeed"|"open"|"dismiss">} Actions
 *
 * @typedef {object} Cell
 * @property {HTMLElement} frame
 * @property {Job|null} job
 * @property {Generation|null} generation set once it is done
 *
 * @typedef {object} Sheet
 * @property {SheetPlace} place of any of its cells: what they share is what counts
 * @property {import("./api.js").ImageRequest} request of any of its cells
 * @property {HTMLElement} card
 * @property {HTMLElement} head
 * @property {(Cell|null)[]} cells by number
 * @property {string} announced
 */

/** @type {import("./queue.js").State[]} */
const OVER = ["failed", "cancelled", "interrupted"];

/**
 * @param {Board} board of single generations
 * @param {Actions} actions
 * @param {import("./store.js").Store} store
 * @returns {Board & {complete: () => Promise<void>}} `complete`: takes from the store what the sheets shown lack
 */
export function startSheets(board, actions, store) {
  /** @type {Map<string, Sheet>} */
  const sheets = new Map();

  /**
   * @param {import("./api.js").ImageRequest} request
   * @returns {{sheet: Sheet, cell: Cell}|null} null where it belongs to no sheet
   */
  const cellOf = (request) => {
    const { sheet: at } = request;
    if (!at) return null;
    let sheet = sheets.get(at.id);
    if (!sheet) {
      const card = element("article", { class: "card sheet", "data-id": at.id });
      const head = element("header", { class: "card-head" });
      sheet = { place: at, request, card, head, cells: new Array(at.numCells).fill(null), announced: "" };
      sheets.set(at.id, sheet);
      layOut(sheet, actions);
      place(card, at.id);
      byId("empty").hidden = true;
    }
    const frame = /** @type {HTMLElement} */ (sheet.card.querySelector(`[data-cell="${at.cell}"]`));
    const cell = (sheet.cells[at.cell] ??= { frame, job: null, generation: null });
    return { sheet, cell };
  };
  /**
   * @param {string} id of a request
   * @returns {[Sheet, number]|null}
   */
  const find = (id) => {
    for (const sheet of sheets.values()) {
      const number = sheet.cells.findIndex((cell) => (cell?.generation?.id ?? cell?.job?.id) === id);
      if (number >= 0) return [sheet, number];
    }
    return null;
  };
  /** @param {Generation} generation */
  const showGeneration = (generation) => {
    const found = cellOf(generation.request);
    if (!found) return board.showGeneration(generation);
    found.cell.generation = generation;
    showCell(found.cell, actions);
    showHead(found.sheet, actions, remove);
    announceDone(found.sheet);
  };
  /** @param {Sheet} sheet */
  const remove = (sheet) => {
    removeImages(sheet.card);
    sheet.card.remove();
    sheets.delete(sheet.place.id);
    byId("empty").hidden = byId("generations").childElementCount > 0;
  };
  onLanguage(() => {
    for (const sheet of sheets.values()) {
      layOut(sheet, actions);
      showHead(sheet, actions, remove);
    }
  });

  return {
    show: (job, what) => {
      const found = cellOf(job.request);
      if (!found) return board.show(job, what);
      found.cell.job = job;
      if (what === "progress") showProgress(found.cell.frame, job);
      else if (what === "preview") showPreview(found.cell.frame, job);
      else {
        showCell(found.cell, actions);
        showHead(found.sheet, actions, remove);
      }
    },
    showGeneration,
    update: (generation) => (generation.request.sheet ? showGeneration(generation) : board.update(generation)),
    warn: (id, text) => {
      const found = find(id);
      if (!found) return board.warn(id, text);
      found[0].head.querySelector(".warning")?.remove();
      found[0].head.append(element("p", { class: "warning", text }));
    },
    remove: (id) => {
      const found = find(id);
      if (!found) return board.remove(id);
      const [sheet, number] = found;
      const { frame } = /** @type {Cell} */ (sheet.cells[number]);
      sheet.cells[number] = null;
      removeImages(frame);
      if (sheet.cells.every((cell) => cell === null)) remove(sheet);
      else showHead(sheet, actions, remove);
    },
    clear: () => {
      board.clear();
      for (const sheet of sheets.values()) {
        sheet.cells.forEach((cell, number) => {
          if (cell?.generation) sheet.cells[number] = null;
        });
        if (sheet.cells.every((cell) => cell === null)) remove(sheet);
        else layOut(sheet, actions);
      }
    },
    complete: async () => {
      for (const { place: at, cells } of sheets.values()) {
        const lacks = cells.filter((cell) => cell === null).length;
        if (!lacks) continue;
        const [after] = at.id.split("-"); // its generations are of the same time or later
        /** @param {Generation} each */
        const isLacking = ({ request }) => request.sheet?.id === at.id && cells[request.sheet.cell] === null;
        for (const generation of await store.newest(null, lacks, isLacking, after)) showGeneration(generation);
      }
    },
  };
}

/**
 * @param {Sheet} sheet
 * @returns {string}
 */
export function titleOf({ place: { axes, numCells } }) {
  return axes.length
    ? axes.map(({ attribute }) => wordShown(attribute)).join(" × ")
    : t("sheet.list_title", { n: numCells });
}

/**
 * The card with a frame for every cell, and what is known in them.
 * @param {Sheet} sheet
 * @param {Actions} actions
 */
function layOut(sheet, actions) {
  const { place: at, card, head } = sheet;
  const [rows, columns] = at.axes;
  removeImages(card);
  head.replaceChildren();
  const frames = Array.from({ length: at.numCells }, (_, cell) => element("div", { class: "cell", "data-cell": cell }));
  const body = columns ? tableOf(rows, columns, frames) : rows ? labelledOf(rows, frames) : listOf(frames);
  card.append(head, body);
  sheet.cells.forEach((cell, number) => {
    if (!cell) return;
    cell.frame = frames[number];
    showCell(cell, actions);
  });
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

// ------------------------------------------------------------------------------------------------------------- cells

/**
 * @param {Cell} cell
 * @param {Actions} actions
 */
function showCell(cell, actions) {
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
  const text = OVER.includes(job.state) ? t(`sheet.${job.state}`) : isGenerating ? "" : t("sheet.waiting");
  const bar = isGenerating ? element("progress", { max: 1, "aria-label": t("card.progress") }) : null;
  return element("div", { class: "blank" }, element("span", { class: "preview", text }), bar);
}

/**
 * @param {HTMLElement} frame
 * @param {Job} job
 */
function showProgress(frame, job) {
  const bar = frame.querySelector("progress");
  if (bar && job.tokensTotal) bar.value = job.tokensGenerated / job.tokensTotal;
}

/**
 * The first candidate's latest preview, in place of the one before once it can be painted.
 * @param {HTMLElement} frame
 * @param {Job} job
 */
function showPreview(frame, job) {
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

// -------------------------------------------------------------------------------------------------------------- head

/**
 * What the sheet is, how far it is, and what can be done with it.
 * @param {Sheet} sheet
 * @param {Actions} actions
 * @param {(sheet: Sheet) => void} remove
 */
function showHead(sheet, actions, remove) {
  const { place: at, request, head } = sheet;
  const jobs = sheet.cells.flatMap((cell) => (cell?.job && !cell.generation ? [cell.job] : []));
  const over = jobs.filter((job) => OVER.includes(job.state));
  const active = jobs.filter((job) => !OVER.includes(job.state) && job.state !== "done");
  const done = generationsOf(sheet);
  const failed = over.find((job) => job.state === "failed");
  const cancel = () => [...active].reverse().forEach(actions.cancel);
  const dismiss = () => {
    over.forEach((job) => actions.dismiss(job.id));
    remove(sheet);
  };
  const buttons = [
    active.length ? button({ icon: "close", text: t("card.cancel"), press: cancel, action: "cancel" }) : null,
    active.length ? null : button({ icon: "close", label: t("card.dismiss"), press: dismiss, action: "dismiss" }),
  ];
  const isLeft = over.length > 0 && active.length === 0;
  const next = t("sheet.continue", { n: over.length });
  const goOn = () => over.forEach(actions.retry);
  const download = () => saveSheet(titleOf(sheet), at, done);
  const focused = head.contains(document.activeElement) ? document.activeElement?.getAttribute("data-action") : null;
  const progress = element("progress", { max: at.numCells, "aria-label": t("card.progress") });
  progress.value = done.length;
  head.replaceChildren(
    element("h3", { text: titleOf(sheet) }),
    ...(at.caption ? [element("p", { class: "sheet-caption", text: at.caption }), readingOf(at.caption) ?? ""] : []),
    element(
      "p",
      { class: "facts hint" },
      element("span", { text: formatTime(Number(at.id.split("-")[0])) }),
      element("span", { class: "numbers", text: t("card.seed", { seed: request.seed }) }),
      element("span", { text: t("card.candidates", { n: request.candidates }) }),
    ),
    element(
      "div",
      { class: "card-state" },
      element("span", { class: "state numbers", text: t("sheet.progress", { done: done.length, total: at.numCells }) }),
      ...buttons.filter((each) => each !== null),
    ),
    element(
      "div",
      { class: "sheet-tools" },
      isLeft ? button({ icon: "again", text: next, class: "secondary", press: goOn, action: "continue" }) : null,
      done.length
        ? button({ icon: "download", text: t("sheet.download"), press: () => void download(), action: "sheet-download" })
        : null,
      button({ text: t("card.use_seed"), press: () => actions.useSeed(request), action: "seed" }),
    ),
    ...(active.length ? [progress] : []),
    ...(failed ? [element("p", { class: "fault", text: whyFailed(failed) })] : []),
  );
  if (focused) /** @type {HTMLElement|null} */ (head.querySelector(`[data-action="${focused}"]`))?.focus();
}

/**
 * @param {Sheet} sheet
 * @returns {Generation[]}
 */
function generationsOf({ cells }) {
  return cells.flatMap((cell) => cell?.generation ?? []);
}

/**
 * Read out once it is complete, not with each cell.
 * @param {Sheet} sheet
 */
function announceDone(sheet) {
  const isDone = generationsOf(sheet).length === sheet.place.numCells;
  const hasRun = sheet.cells.some((cell) => cell?.job);
  if (isDone && hasRun && !sheet.announced) announce((sheet.announced = t("sheet.done")));
}
