/**
 * Generating from an init image: keep its top rows and generate the rest, inpaint what is painted over, or leave the choice
 * to the model.
 */

import { button, byId, element, fillDialog, isSmall } from "./elements.js";
import { createMask, maskPng } from "./mask.js";
import { MOST_CHARACTERS } from "./caption.js";
import { ask } from "./question.js";
import { randomSeed } from "./settings.js";
import { startStage } from "./stage.js";
import { STRENGTH, showStrength, strengthFault, strengthPanel } from "./strength.js";
import { t } from "./texts.js";

// 7 of 16 rows, as the engine keeps by default.
const KEPT_SHARE = 0.4375;

/**
 * @typedef {import("./stage.js").Work & {choice: import("./strength.js").Choice, before: string}} Work `before`: the caption
 * @typedef {import("./settings.js").Settings & {caption: string}} Base
 */

/**
 * @param {Blob} image square
 * @param {"rows"|"mask"|"strength"} kind what to begin with
 * @param {Base} base caption and settings; its seed is not used
 * @param {number} grid rows of tokens in the model's images
 * @returns {Promise<import("./api.js").ImageRequest|null>} null when the user cancels
 */
export async function editImage(image, kind, base, grid) {
  const bitmap = await createImageBitmap(image);
  /** @type {Work} */
  const work = {
    image: bitmap,
    mask: createMask(bitmap.width, grid),
    kind,
    keepRows: Math.max(1, Math.floor(KEPT_SHARE * grid)),
    tool: "brush",
    brushShare: 0.16,
    choice: { strength: STRENGTH, isOnlyChanged: false },
    before: oneLine(base.caption),
  };
  const dialog = /** @type {HTMLDialogElement} */ (byId("editor"));
  const canvas = element("canvas", { class: isSmall(bitmap.width) ? "stage crisp" : "stage", role: "application" });
  const show = () => showWork(dialog, canvas, work);
  const stage = startStage(canvas, work, show);
  const redraw = () => {
    stage.draw();
    show();
  };
  const caption = element("textarea", { id: "editor-caption", rows: 3, spellcheck: "false" });
  caption.value = base.caption;
  caption.addEventListener("input", show);
  let isAsking = false;
  const abandon = async () => {
    if (isAsking) return;
    isAsking = true;
    const isKept = work.mask.canUndo() || caption.value !== base.caption;
    const question = { title: t("leave.title"), text: t("leave.text"), yes: t("leave.yes"), isGrave: true };
    if (!isKept || (await ask(question))) dialog.close("no");
    isAsking = false;
  };
  const form = element(
    "form",
    { class: "editor-body", novalidate: true },
    element(
      "header",
      { class: "dialog-head" },
      element("h2", { id: "editor-title", text: t("editor.title") }),
      button({ icon: "close", label: t("close"), class: "quiet icon-only", press: abandon }),
    ),
    element("div", { class: "stage-frame" }, canvas),
    element(
      "div",
      { class: "editor-panel" },
      kindChoice(work, redraw),
      rowsPanel(work, redraw),
      maskPanel(work, redraw),
      strengthPanel(work.choice, work.before, redraw),
      element(
        "div",
        { class: "field" },
        element("label", { for: "editor-caption", text: t("caption.label") }),
        caption,
      ),
      element("p", { class: "hint", text: t("editor.settings", { n: base.n, candidates: base.candidates }) }),
      element("p", { id: "editor-fault", class: "fault", role: "status" }),
      element(
        "div",
        { class: "actions" },
        button({ text: t("no"), class: "secondary", press: abandon }),
        element("button", { id: "editor-generate", type: "submit", class: "primary", text: t("editor.generate") }),
      ),
    ),
  );
  /** @param {Event} event */
  const submit = (event) => {
    event.preventDefault();
    if (!faultOf(work, caption.value)) dialog.close("yes");
  };
  form.addEventListener("submit", submit);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.preventDefault(); // or the browser closes the dialog
      void abandon();
    } else if (pressUndo(event, work)) redraw();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  });
  /** @param {Event} event */
  const closing = (event) => {
    event.preventDefault();
    void abandon();
  };
  dialog.addEventListener("cancel", closing);
  fillDialog("editor", form);
  dialog.returnValue = "no";
  dialog.showModal();
  show();
  /** @type {HTMLElement} */ (form.querySelector("input[name='editor-kind']:checked")).focus();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  dialog.removeEventListener("cancel", closing);
  stage.stop();
  const wanted = dialog.returnValue === "yes" ? await requestOf(work, image, caption.value, base) : null;
  bitmap.close();
  fillDialog("editor", element("div"));
  return wanted;
}

/**
 * @param {Work} work
 * @param {Blob} image
 * @param {string} caption
 * @param {Base} base
 * @returns {Promise<import("./api.js").ImageRequest>}
 */
async function requestOf(work, image, caption, base) {
  const { n, candidates, temperature, guidance, topK, topP } = base;
  const isMask = work.kind === "mask";
  const isChosen = work.kind === "strength";
  const { strength, isOnlyChanged } = work.choice;
  return {
    kind: work.kind,
    caption: oneLine(caption),
    ...{ n, candidates, temperature, guidance, topK, topP },
    seed: randomSeed(),
    keepRows: work.kind === "rows" ? work.keepRows : null,
    strength: isChosen && !isOnlyChanged ? strength : null,
    changedFrom: isChosen && isOnlyChanged ? work.before : null,
    image,
    mask: isMask ? await maskPng(work.mask) : null,
  };
}

/**
 * @param {Work} work
 * @param {string} caption
 * @returns {string} why nothing can be generated yet; "" when it can
 */
function faultOf(work, caption) {
  const length = [...oneLine(caption)].length;
  if (!length) return t("caption.missing");
  if (length > MOST_CHARACTERS)
    return t("caption.too_long", { over: length - MOST_CHARACTERS, limit: MOST_CHARACTERS });
  if (work.kind === "rows") return "";
  if (work.kind === "strength") return strengthFault(work.choice, work.before, oneLine(caption));
  const numTouched = work.mask.touchedCells().filter(Boolean).length;
  if (!numTouched) return t("editor.nothing");
  return numTouched === work.mask.grid ** 2 ? t("editor.everything") : "";
}

/** @param {string} caption */
function oneLine(caption) {
  return caption.normalize("NFC").replace(/\s+/gu, " ").trim();
}

/**
 * Shows the state of the work in every control.
 * @param {HTMLDialogElement} dialog
 * @param {HTMLCanvasElement} canvas
 * @param {Work} work
 */
function showWork(dialog, canvas, work) {
  const isMask = work.kind === "mask";
  const caption = /** @type {HTMLTextAreaElement|null} */ (dialog.querySelector("#editor-caption"));
  if (!caption) return;
  canvas.tabIndex = isMask ? 0 : -1;
  canvas.setAttribute("aria-label", t(`editor.stage_${work.kind}`, { n: work.keepRows }));
  byId("editor-rows").hidden = work.kind !== "rows";
  byId("editor-strength").hidden = work.kind !== "strength";
  showStrength(work.choice, work.mask.grid ** 2);
  byId("editor-mask").hidden = !isMask;
  const numTouched = work.mask.touchedCells().filter(Boolean).length;
  byId("editor-cells").textContent = t("editor.cells", { n: numTouched, total: work.mask.grid ** 2 });
  /** @type {HTMLInputElement} */ (byId("keep-rows")).value = String(work.keepRows);
  byId("kept-rows").textContent = t("editor.kept_rows", { n: work.keepRows, total: work.mask.grid });
  byId("editor-undo").toggleAttribute("disabled", !work.mask.canUndo());
  byId("editor-redo").toggleAttribute("disabled", !work.mask.canRedo());
  const fault = faultOf(work, caption.value);
  byId("editor-fault").textContent = fault;
  byId("editor-generate").toggleAttribute("disabled", fault !== "");
}

/**
 * @param {Work} work
 * @param {() => void} redraw
 */
function kindChoice(work, redraw) {
  /** @param {"rows"|"mask"|"strength"} kind */
  const option = (kind) => {
    const change = () => {
      work.kind = kind;
      redraw();
    };
    const input = element("input", {
      type: "radio",
      name: "editor-kind",
      value: kind,
      checked: work.kind === kind,
      on: { change },
    });
    return element("label", { class: "segment" }, input, element("span", { text: t(`editor.kind_${kind}`) }));
  };
  return element(
    "fieldset",
    { class: "segments" },
    element("legend", { class: "visually-hidden", text: t("editor.kind") }),
    option("rows"),
    option("mask"),
    option("strength"),
  );
}

/**
 * @param {Work} work
 * @param {() => void} redraw
 */
function rowsPanel(work, redraw) {
  const slider = element("input", {
    id: "keep-rows",
    type: "range",
    min: 1,
    max: work.mask.grid - 1,
    step: 1,
    "aria-describedby": "kept-rows",
  });
  slider.addEventListener("input", () => {
    work.keepRows = Number(slider.value);
    redraw();
  });
  return element(
    "div",
    { id: "editor-rows", class: "field" },
    element("label", { for: "keep-rows", text: t("editor.keep_rows") }),
    slider,
    element("p", { id: "kept-rows", class: "hint" }),
    element("p", { class: "hint", text: t("editor.rows_hint") }),
  );
}

/**
 * @param {Work} work
 * @param {() => void} redraw
 */
function maskPanel(work, redraw) {
  /** @param {"brush"|"eraser"} name */
  const tool = (name) => {
    const input = element("input", {
      type: "radio",
      name: "tool",
      value: name,
      checked: work.tool === name,
      on: { change: () => (work.tool = name) },
    });
    return element("label", { class: "segment" }, input, element("span", { text: t(`editor.${name}`) }));
  };
  const size = element("input", {
    id: "brush-size",
    type: "range",
    min: 2,
    max: 60,
    step: 2,
    value: work.brushShare * 100,
  });
  size.addEventListener("input", () => {
    work.brushShare = Number(size.value) / 100;
    redraw();
  });
  /** @param {() => void} what */
  const act = (what) => () => {
    what();
    redraw();
  };
  const undo = button({ icon: "undo", text: t("editor.undo"), press: act(work.mask.undo) });
  const redo = button({ icon: "redo", text: t("editor.redo"), press: act(work.mask.redo) });
  undo.id = "editor-undo";
  redo.id = "editor-redo";
  return element(
    "div",
    { id: "editor-mask" },
    element(
      "fieldset",
      { class: "segments" },
      element("legend", { class: "visually-hidden", text: t("editor.tool") }),
      tool("brush"),
      tool("eraser"),
    ),
    element(
      "div",
      { class: "field" },
      element("label", { for: "brush-size", text: t("editor.size") }),
      size,
    ),
    element(
      "div",
      { class: "row" },
      undo,
      redo,
      button({ icon: "bin", text: t("editor.clear"), press: act(() => work.mask.fill(0)) }),
    ),
    element("p", { id: "editor-cells", class: "hint" }),
    element("p", { class: "hint", text: t("editor.mask_hint") }),
  );
}

/**
 * @param {KeyboardEvent} event
 * @param {Work} work
 * @returns {boolean} whether the keys meant undo or redo, outside a text
 */
function pressUndo(event, work) {
  const isInText = event.target instanceof HTMLTextAreaElement;
  if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z" || isInText) return false;
  event.preventDefault();
  return event.shiftKey ? work.mask.redo() : work.mask.undo();
}
