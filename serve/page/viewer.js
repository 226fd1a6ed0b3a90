/**
 * One picture, large, with how it was made and all that can be done with it.
 */

import { settingsOf } from "./api.js";
import { button, byId, element, fillDialog, isSmall, picture, tellBriefly } from "./elements.js";
import { formatNumber, formatScore, formatTime, t } from "./texts.js";

const MARGIN = 16; // pixels round the picture

/** @typedef {import("./store.js").Drawing} Drawing */

/**
 * @typedef {object} ViewerActions
 * @property {(drawing: Drawing, index: number, isFavourite: boolean) => Promise<Drawing>} favour
 * @property {(drawing: Drawing, index: number) => void} download
 * @property {(request: import("./api.js").ImageRequest) => void} useSeed
 * @property {(request: import("./api.js").ImageRequest) => void} useSettings
 * @property {(drawing: Drawing, index: number, kind: "rows"|"mask") => void} startFrom
 * @property {(drawing: Drawing, index: number) => Promise<boolean>} remove whether it was
 */

/**
 * @param {Drawing} drawing
 * @param {number} index of the picture to begin with
 * @param {ViewerActions} actions
 */
export function openViewer(drawing, index, actions) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("viewer"));
  const state = { drawing, index };
  const show = (focus) => {
    const frame = element("div", { class: "viewer-frame" });
    const panel = panelOf(dialog, state, actions, show);
    fillDialog("viewer", element("div", { class: "viewer-body" }, headOf(dialog, state, show), frame, panel));
    const shown = state.drawing.pictures[state.index];
    const image = picture(shown.blob, t("picture.alt", { caption: state.drawing.request.caption, rank: shown.rank }));
    image.addEventListener("load", () => fit(image, frame));
    frame.append(image);
    if (focus) /** @type {HTMLElement|null} */ (dialog.querySelector(`[data-action="${focus}"]`))?.focus();
  };
  const resized = () => {
    const frame = dialog.querySelector(".viewer-frame");
    const image = frame?.querySelector("img");
    if (image?.naturalWidth) fit(image, frame);
  };
  const pressed = (event) => {
    if (event.key === "ArrowLeft") step(state, -1, show);
    else if (event.key === "ArrowRight") step(state, 1, show);
  };
  dialog.addEventListener("keydown", pressed);
  window.addEventListener("resize", resized);
  dialog.addEventListener(
    "close",
    () => {
      dialog.removeEventListener("keydown", pressed);
      window.removeEventListener("resize", resized);
      fillDialog("viewer", element("div"));
    },
    { once: true },
  );
  show(null);
  dialog.showModal();
  resized();
}

/** As large as there is room; small pictures by a whole number, so that each pixel stays as large as its neighbour. */
function fit(image, frame) {
  const room = Math.min(frame.clientWidth, frame.clientHeight) - 2 * MARGIN;
  const side = image.naturalWidth;
  const scale = isSmall(side) ? Math.max(1, Math.floor(room / side)) : Math.min(room / side, 4);
  image.style.setProperty("width", `${side * scale}px`);
}

function step(state, by, show) {
  const next = state.index + by;
  if (next < 0 || next >= state.drawing.pictures.length) return;
  state.index = next;
  show(by < 0 ? "previous" : "next");
}

function headOf(dialog, state, show) {
  const { drawing, index } = state;
  const last = drawing.pictures.length - 1;
  const move = (by, drawn, label, data, disabled) =>
    button({ icon: drawn, label, class: "quiet icon-only", press: () => step(state, by, show), data, disabled });
  return element(
    "header",
    { class: "dialog-head" },
    element("h2", { id: "viewer-title", text: t("picture.rank", { rank: drawing.pictures[index].rank }) }),
    element("span", { class: "hint numbers", text: t("viewer.of", { n: index + 1, total: last + 1 }) }),
    move(-1, "left", t("viewer.previous"), "previous", index === 0),
    move(1, "right", t("viewer.next"), "next", index === last),
    button({ icon: "close", label: t("close"), class: "quiet icon-only", press: () => dialog.close() }),
  );
}

function panelOf(dialog, state, actions, show) {
  const { drawing, index } = state;
  const shown = drawing.pictures[index];
  const closing = (act) => () => {
    dialog.close();
    act();
  };
  const star = async () => {
    state.drawing = await actions.favour(drawing, index, !shown.isFavourite);
    show("star");
  };
  const remove = async () => {
    if (await actions.remove(drawing, index)) dialog.close();
  };
  return element(
    "div",
    { class: "viewer-panel" },
    element("p", { class: "viewer-caption", text: drawing.request.caption }),
    element(
      "div",
      { class: "viewer-actions" },
      button({
        icon: "download",
        text: t("viewer.download"),
        class: "primary",
        press: () => actions.download(drawing, index),
        data: "download",
      }),
      button({
        icon: "star",
        text: t(shown.isFavourite ? "viewer.is_favourite" : "viewer.favourite"),
        class: "secondary star",
        pressed: shown.isFavourite,
        press: star,
        data: "star",
      }),
      button({
        icon: "layers",
        text: t("viewer.variations"),
        class: "secondary",
        press: closing(() => actions.startFrom(drawing, index, "rows")),
        data: "variations",
      }),
      button({
        icon: "brush",
        text: t("viewer.repaint"),
        class: "secondary",
        press: closing(() => actions.startFrom(drawing, index, "mask")),
        data: "repaint",
      }),
    ),
    factsOf(drawing, shown),
    element(
      "div",
      { class: "row" },
      button({ text: t("card.use_seed"), press: closing(() => actions.useSeed(drawing.request)), data: "seed" }),
      button({
        text: t("card.use_settings"),
        press: closing(() => actions.useSettings(drawing.request)),
        data: "settings",
      }),
      button({ icon: "copy", text: t("viewer.copy"), press: () => copySettings(drawing, dialog), data: "copy" }),
      button({ icon: "bin", text: t("viewer.remove"), class: "quiet danger", press: remove, data: "remove" }),
    ),
  );
}

/** Everything that made the picture, by name. */
function factsOf(drawing, shown) {
  const { request } = drawing;
  const rows = [
    ["viewer.score", shown.score === null ? t("viewer.no_score") : formatScore(shown.score)],
    ["settings.seed", request.seed],
    ["viewer.candidate", t("viewer.candidate_of", { n: shown.candidate + 1, total: drawing.pictures.length })],
    ["settings.temperature", formatNumber(request.temperature)],
    ["settings.guidance", formatNumber(request.guidance)],
    ["settings.topK_short", request.topK === null ? null : formatNumber(request.topK)],
    ["settings.topP_short", request.topP === null ? null : formatNumber(request.topP)],
    ["viewer.kind", request.kind === "new" ? null : t(`kind.${request.kind}`)],
    ["viewer.model", drawing.modelId],
    ["viewer.time", formatTime(drawing.createdMs)],
  ];
  const told = rows.filter(([, value]) => value !== null);
  return element(
    "dl",
    { class: "facts-list" },
    ...told.flatMap(([key, value]) => [element("dt", { text: t(key) }), element("dd", { text: value })]),
  );
}

/** As the fields of a request to the API: what a colleague, or a program, needs to draw the same. */
async function copySettings(drawing, dialog) {
  const fields = settingsOf(drawing.request);
  const text = `${JSON.stringify(fields, null, 1).slice(0, -2)},\n "seed": ${drawing.request.seed},\n "model": ${JSON.stringify(drawing.modelId)}\n}`;
  tellBriefly((await copyText(text, dialog)) ? t("viewer.copied") : t("viewer.not_copied"));
}

/**
 * @param {string} text
 * @param {HTMLElement} dialog the open one: outside of it nothing can be selected
 * @returns {Promise<boolean>}
 */
async function copyText(text, dialog) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https browsers offer no clipboard to pages, but still copy what is selected.
    const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    dialog.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}
