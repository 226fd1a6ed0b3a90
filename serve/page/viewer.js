/**
 * One image, large, with its provenance and all that can be done with it.
 */

import { settingsOf } from "./api.js";
import { copyText } from "./clipboard.js";
import { compareWithSource } from "./compare.js";
import { button, byId, element, fillDialog, imageElement, isSmall, showBriefly } from "./elements.js";
import { inLanguageShown, readingOf } from "./model.js";
import { sizeChoice } from "./sizes.js";
import { formatNumber, formatScore, formatTime, t } from "./texts.js";
import { linkButton } from "./shared.js";
import { unreadWords, verdictOf } from "./verdict.js";

const MARGIN = 16; // pixels around the image

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./store.js").RankedImage} RankedImage
 *
 * @typedef {object} ViewerActions
 * @property {(generation: Generation, index: number, isFavourite: boolean) => Promise<Generation>} favour
 * @property {(request: import("./api.js").ImageRequest) => void} useSeed
 * @property {(request: import("./api.js").ImageRequest) => void} useSettings
 * @property {(generation: Generation, index: number, kind: "rows"|"mask"|"strength") => void} startFrom
 * @property {(generation: Generation, index: number) => Promise<boolean>} remove whether it was
 * @property {(pictures: import("./library.js").Picture[]) => Promise<void>} collect
 *
 * @typedef {{generation: Generation, index: number}} State
 * @typedef {(focus: string|null) => void} Show `focus`: the action that has the keyboard afterwards
 */

/**
 * @param {Generation} generation
 * @param {number} index of the image to begin with
 * @param {ViewerActions} actions
 */
export function openViewer(generation, index, actions) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("viewer"));
  /** @type {State} */
  const state = { generation, index };
  /** @type {Show} */
  const show = (focus) => {
    const frame = element("div", { class: "viewer-frame" });
    const panel = panelOf(dialog, state, actions, show);
    fillDialog("viewer", element("div", { class: "viewer-body" }, headOf(dialog, state, show), frame, panel));
    const shown = state.generation.images[state.index];
    const caption = state.generation.request.caption;
    const image = imageElement(shown.blob, t("image.alt", { caption: inLanguageShown(caption) || caption, rank: shown.rank }));
    image.addEventListener("load", () => fit(image, frame));
    frame.append(image);
    if (focus) /** @type {HTMLElement|null} */ (dialog.querySelector(`[data-action="${focus}"]`))?.focus();
  };
  const resized = () => {
    const frame = dialog.querySelector(".viewer-frame");
    const image = frame?.querySelector("img");
    if (frame && image?.naturalWidth) fit(image, frame);
  };
  /** @param {KeyboardEvent} event */
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

/**
 * As large as fits; small images by a whole number, so that each pixel stays as large as the next.
 * @param {HTMLImageElement} image
 * @param {Element} frame
 */
function fit(image, frame) {
  const space = Math.min(frame.clientWidth, frame.clientHeight) - 2 * MARGIN;
  const side = image.naturalWidth;
  const scale = isSmall(side) ? Math.max(1, Math.floor(space / side)) : Math.min(space / side, 4);
  image.style.setProperty("width", `${side * scale}px`);
}

/**
 * @param {State} state
 * @param {number} by
 * @param {Show} show
 */
function step(state, by, show) {
  const next = state.index + by;
  if (next < 0 || next >= state.generation.images.length) return;
  state.index = next;
  show(by < 0 ? "previous" : "next");
}

/**
 * @param {HTMLDialogElement} dialog
 * @param {State} state
 * @param {Show} show
 */
function headOf(dialog, state, show) {
  const { generation, index } = state;
  const last = generation.images.length - 1;
  /**
   * @param {number} by
   * @param {"left"|"right"} icon
   * @param {string} label
   * @param {string} action
   * @param {boolean} disabled
   */
  const move = (by, icon, label, action, disabled) =>
    button({ icon, label, class: "quiet icon-only", press: () => step(state, by, show), action, disabled });
  return element(
    "header",
    { class: "dialog-head" },
    element("h2", { id: "viewer-title", text: t("image.rank", { rank: generation.images[index].rank }) }),
    element("span", { class: "hint numbers", text: t("viewer.of", { n: index + 1, total: last + 1 }) }),
    move(-1, "left", t("viewer.previous"), "previous", index === 0),
    move(1, "right", t("viewer.next"), "next", index === last),
    button({ icon: "close", label: t("close"), class: "quiet icon-only", press: () => dialog.close() }),
  );
}

/**
 * @param {HTMLDialogElement} dialog
 * @param {State} state
 * @param {ViewerActions} actions
 * @param {Show} show
 */
function panelOf(dialog, state, actions, show) {
  const { generation, index } = state;
  const shown = generation.images[index];
  /** @param {() => void} act */
  const closing = (act) => () => {
    dialog.close();
    act();
  };
  const star = async () => {
    state.generation = await actions.favour(generation, index, !shown.isFavourite);
    show("star");
  };
  const remove = async () => {
    if (await actions.remove(generation, index)) dialog.close();
  };
  const size = sizeChoice(generation, index);
  const compare = () => compareWithSource(generation, index);
  return element(
    "div",
    { class: "viewer-panel" },
    element("p", { class: "viewer-caption", text: generation.request.caption }),
    readingOf(generation.request.caption),
    element("p", { class: "verdict", text: [verdictOf(generation, shown), unreadWords(generation)].join(" ").trim() }),
    element(
      "div",
      { class: "viewer-actions" },
      button({
        icon: "download",
        text: t("viewer.download"),
        class: "primary",
        press: () => void size.save(),
        action: "download",
      }),
      button({
        icon: "star",
        text: t(shown.isFavourite ? "viewer.is_favourite" : "viewer.favourite"),
        class: "secondary star",
        pressed: shown.isFavourite,
        press: star,
        action: "star",
      }),
      button({
        icon: "layers",
        text: t("viewer.variations"),
        class: "secondary",
        press: closing(() => actions.startFrom(generation, index, "rows")),
        action: "variations",
      }),
      button({
        icon: "brush",
        text: t("viewer.inpaint"),
        class: "secondary",
        press: closing(() => actions.startFrom(generation, index, "mask")),
        action: "inpaint",
      }),
    ),
    size.field,
    factsOf(generation, shown),
    element(
      "div",
      { class: "row" },
      button({ text: t("card.use_seed"), press: closing(() => actions.useSeed(generation.request)), action: "seed" }),
      button({
        text: t("card.use_settings"),
        press: closing(() => actions.useSettings(generation.request)),
        action: "settings",
      }),
      generation.request.image
        ? button({ icon: "compare", text: t("source.compare"), press: compare, action: "compare-source" })
        : null,
      button({ text: t("collection.title"), press: () => actions.collect([{ generation, image: shown }]), action: "collect" }),
      button({ icon: "copy", text: t("viewer.copy"), press: () => copySettings(generation, dialog), action: "copy" }),
      linkButton(generation.request, dialog),
      button({ icon: "bin", text: t("viewer.remove"), class: "quiet danger", press: remove, action: "remove" }),
    ),
  );
}

/**
 * Everything that determined the image, by name.
 * @param {Generation} generation
 * @param {RankedImage} shown
 */
function factsOf(generation, shown) {
  const { request } = generation;
  /** @type {[string, string|null][]} */
  const rows = [
    ["viewer.score", shown.score === null ? t("viewer.no_score") : formatScore(shown.score)],
    ["settings.seed", request.seed],
    ["viewer.candidate", t("viewer.candidate_of", { n: shown.candidate + 1, total: generation.images.length })],
    ["settings.temperature", formatNumber(request.temperature)],
    ["settings.guidance", formatNumber(request.guidance)],
    ["settings.topK_short", request.topK === null ? null : formatNumber(request.topK)],
    ["settings.topP_short", request.topP === null ? null : formatNumber(request.topP)],
    ["editor.strength", percentOf(request.strength)],
    ["viewer.changed_from", request.changedFrom ?? null],
    ["viewer.kind", request.kind === "new" ? null : t(`kind.${request.kind}`)],
    ["viewer.model", generation.modelId],
    ["viewer.time", formatTime(generation.createdMs)],
  ];
  return element(
    "dl",
    { class: "facts-list" },
    ...rows.flatMap(([key, value]) =>
      value === null ? [] : [element("dt", { text: t(key) }), element("dd", { text: value })],
    ),
  );
}

/**
 * @param {number|null} [share]
 * @returns {string|null}
 */
function percentOf(share) {
  return share === null || share === undefined ? null : `${formatNumber(Math.round(share * 100))}%`;
}

/**
 * As the fields of a request to the API: what a colleague, or a program, needs to generate the same.
 * @param {Generation} generation
 * @param {HTMLDialogElement} dialog
 */
async function copySettings(generation, dialog) {
  const fields = settingsOf(generation.request);
  const text = `${JSON.stringify(fields, null, 1).slice(0, -2)},\n "seed": ${generation.request.seed},\n "model": ${JSON.stringify(generation.modelId)}\n}`;
  showBriefly((await copyText(text, dialog)) ? t("viewer.copied") : t("viewer.not_copied"));
}
