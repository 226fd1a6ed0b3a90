/**
 * The gallery: every image that this browser stores, by day, newest first, as its filters and its search let through.
 */

import { byId, element, removeImages } from "./elements.js";
import { startFilters } from "./gallery_filters.js";
import { readingOf } from "./model.js";
import { startSelection } from "./selection.js";
import { formatClock, formatDay, formatNumber, onLanguage, t } from "./texts.js";
import { tileOf } from "./tiles.js";
import { onView } from "./views.js";

const GENERATIONS_AT_ONCE = 24;
const NEARLY_FULL = 0.9; // of what the browser lets the page store

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./store.js").RankedImage} RankedImage
 * @typedef {import("./library.js").Picture} Picture
 * @typedef {Pick<import("./cards.js").Actions, "open"|"favour"|"download"> & import("./selection.js").SelectionActions &
 *   {clear: () => void, stripCollection: (id: string) => Promise<void>, reportCollections: () => void}} GalleryActions
 *
 * @typedef {object} Gallery
 * @property {() => Promise<void>} refresh
 * @property {(text: string) => void} showFault
 */

/**
 * @param {import("./store.js").Store} store
 * @param {GalleryActions} actions
 * @returns {Gallery}
 */
export function startGallery(store, actions) {
  const grid = byId("gallery-grid");
  /** @type {Generation[]} */
  let shown = [];
  let numRefreshes = 0;
  // Images are made when the gallery is in view; a generation that ends meanwhile only counts.
  const isInView = () => !byId("gallery").hidden;

  const selection = startSelection(grid, store, actions);
  const filters = startFilters(store, () => void refresh(), actions);
  /** @param {Generation} generation */
  const picturesOf = (generation) =>
    filters.isCaptionWanted(generation)
      ? generation.images.filter(filters.isWanted).map((image) => ({ generation, image }))
      : [];
  /**
   * @param {string|null} before
   * @param {number} count
   */
  const read = (before, count) => store.newest(before, count, (generation) => picturesOf(generation).length > 0);
  const count = async () => {
    const number = await store.count();
    byId("gallery-count").textContent = number ? String(number) : "";
    byId("gallery-summary").textContent = number ? await summaryOf(number) : "";
    byId("clear-gallery").hidden = number === 0;
    byId("gallery-filters").hidden = number === 0;
  };
  const render = async () => {
    removeImages(grid);
    const pictures = shown.flatMap(picturesOf);
    selection.show(pictures);
    for (const [day, ofDay] of byDay(pictures)) grid.append(dayElement(day, ofDay, selection, actions));
    const isFiltered = filters.isAny();
    byId("gallery-empty").hidden = shown.length > 0;
    byId("gallery-empty-title").textContent = t(isFiltered ? "gallery.none_found" : "gallery.empty");
    byId("gallery-empty-hint").textContent = t(isFiltered ? "gallery.none_found_hint" : "gallery.empty_hint");
    byId("select-shown").hidden = shown.length === 0;
    const last = shown.at(-1);
    byId("gallery-more").hidden = !last || (await read(last.id, 1)).length === 0;
  };
  const refresh = async () => {
    const number = ++numRefreshes;
    await Promise.all([count(), filters.refresh(), selection.refresh()]);
    if (!isInView()) return;
    const found = await read(null, Math.max(GENERATIONS_AT_ONCE, shown.length));
    if (number !== numRefreshes) return; // a later refresh has started
    shown = found;
    const focused = focusedAction(grid);
    await render();
    if (focused) /** @type {HTMLElement|null} */ (grid.querySelector(focused))?.focus();
  };
  byId("gallery-more").addEventListener("click", async () => {
    shown.push(...(await read(shown.at(-1)?.id ?? null, GENERATIONS_AT_ONCE)));
    await render();
  });
  onView(refresh);
  byId("clear-gallery").addEventListener("click", actions.clear);
  onLanguage(() => {
    if (!store.isLasting) showFault(t("gallery.not_lasting"));
    void refresh();
  });
  return { refresh, showFault };
}

/**
 * @param {string} text shown above the images; "" removes it
 */
function showFault(text) {
  const place = byId("gallery-fault");
  place.hidden = text === "";
  place.textContent = text;
}

/**
 * @param {number} number of generations
 * @returns {Promise<string>} with the share of the disk that they take, where the browser knows it
 */
async function summaryOf(number) {
  const summary = t("gallery.summary", { n: number });
  const { usage, quota } = (await navigator.storage?.estimate?.()) ?? {};
  if (!usage || !quota || usage < NEARLY_FULL * quota) return summary;
  const [used, most] = [usage, quota].map((bytes) => formatNumber(bytes / 2 ** 20, 0));
  return `${summary} · ${t("gallery.nearly_full", { used, most })}`;
}

/**
 * @param {HTMLElement} grid
 * @returns {string|null} what finds the control that has the keyboard, in a grid that is made anew
 */
function focusedAction(grid) {
  const at = document.activeElement;
  const tile = at && grid.contains(at) ? at.closest("[data-picture]") : null;
  const action = at?.getAttribute("data-action");
  return tile && action
    ? `[data-picture="${tile.getAttribute("data-picture")}"] [data-action="${action}"]`
    : null;
}

/**
 * @param {Picture[]} pictures newest first
 * @returns {Map<string, Picture[]>} by the day's heading, in their order
 */
function byDay(pictures) {
  /** @type {Map<string, Picture[]>} */
  const days = new Map();
  for (const picture of pictures) {
    const day = formatDay(picture.generation.createdMs);
    days.set(day, [...(days.get(day) ?? []), picture]);
  }
  return days;
}

/**
 * @param {string} day
 * @param {Picture[]} pictures
 * @param {import("./selection.js").Selection} selection
 * @param {GalleryActions} actions
 */
function dayElement(day, pictures, selection, actions) {
  const items = pictures.map((picture) => {
    const { generation, image } = picture;
    const tile = tileOf(generation, generation.images.indexOf(image), actions);
    tile.append(
      readingOf(generation.request.caption) ??
        element("p", { class: "tile-caption", text: generation.request.caption }),
      element("p", { class: "hint numbers", text: formatClock(generation.createdMs) }),
    );
    return element("li", { "data-picture": selection.keyOf(picture) }, tile, selection.boxOf(picture));
  });
  return element("section", { class: "day" }, element("h2", { text: day }), element("ul", { class: "gallery-grid" }, ...items));
}
