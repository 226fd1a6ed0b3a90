/**
 * Sheets on the board: one card for many requests, whose images fill its cells as they are ready.
 *
 * It is a board of its own around the other one: what belongs to no sheet passes through.
 */

import { place, whyFailed } from "./cards.js";
import { announce, button, byId, element, removeImages } from "./elements.js";
import { readingOf, wordShown } from "./model.js";
import { saveSheet } from "./sheet_picture.js";
import { OVER, cellsOf, showCell, showPreview, showProgress, showWait } from "./sheet_cells.js";
import { formatTime, onLanguage, t } from "./texts.js";

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
      else if (what === "wait") showWait(found.cell.frame, job);
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
  removeImages(card);
  head.replaceChildren();
  const frames = Array.from({ length: at.numCells }, (_, cell) => element("div", { class: "cell", "data-cell": cell }));
  card.append(head, cellsOf(at.axes, frames));
  sheet.cells.forEach((cell, number) => {
    if (!cell) return;
    cell.frame = frames[number];
    showCell(cell, actions);
  });
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
