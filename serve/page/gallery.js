/**
 * The gallery: every image that this browser stores, newest first.
 */

import { tileOf } from "./cards.js";
import { byId, element, removeImages } from "./elements.js";
import { readingOf } from "./model.js";
import { formatTime, onLanguage, t } from "./texts.js";
import { onView } from "./views.js";

const GENERATIONS_AT_ONCE = 24;

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./store.js").RankedImage} RankedImage
 * @typedef {Pick<import("./cards.js").Actions, "open"|"favour"|"download">} TileActions
 *
 * @typedef {object} Gallery
 * @property {() => Promise<void>} refresh
 * @property {(text: string) => void} showFault
 */

/**
 * @param {import("./store.js").Store} store
 * @param {TileActions & {clear: () => void}} actions
 * @returns {Gallery}
 */
export function startGallery(store, actions) {
  const grid = byId("gallery-grid");
  const only = /** @type {HTMLInputElement} */ (byId("only-favourites"));
  /** @type {Generation[]} */
  let shown = [];
  let numRefreshes = 0;
  // Images are made when the gallery is in view; a generation that ends meanwhile only counts.
  const isInView = () => !byId("gallery").hidden;

  /** @param {RankedImage} image */
  const isWanted = (image) => (only.checked ? image.isFavourite : image.isShown || image.isFavourite);
  /**
   * @param {string|null} before
   * @param {number} count
   */
  const read = (before, count) => store.newest(before, count, (generation) => generation.images.some(isWanted));
  const count = async () => {
    const number = await store.count();
    byId("gallery-count").textContent = number ? String(number) : "";
    byId("gallery-summary").textContent = number ? t("gallery.summary", { n: number }) : "";
    byId("clear-gallery").hidden = number === 0;
  };
  const render = async () => {
    removeImages(grid);
    for (const generation of shown) grid.append(...itemsOf(generation, isWanted, actions));
    byId("gallery-empty").hidden = shown.length > 0;
    const last = shown.at(-1);
    byId("gallery-more").hidden = !last || (await read(last.id, 1)).length === 0;
  };
  const refresh = async () => {
    const number = ++numRefreshes;
    await count();
    if (!isInView()) return;
    const found = await read(null, Math.max(GENERATIONS_AT_ONCE, shown.length));
    if (number !== numRefreshes) return; // a later refresh has started
    shown = found;
    await render();
  };
  byId("gallery-more").addEventListener("click", async () => {
    shown.push(...(await read(shown.at(-1)?.id ?? null, GENERATIONS_AT_ONCE)));
    await render();
  });
  only.addEventListener("change", refresh);
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
 * @param {Generation} generation
 * @param {(image: RankedImage) => boolean} isWanted
 * @param {TileActions} actions
 */
function itemsOf(generation, isWanted, actions) {
  return generation.images.flatMap((image, index) => {
    if (!isWanted(image)) return [];
    const tile = tileOf(generation, index, actions);
    tile.append(
      readingOf(generation.request.caption) ??
        element("p", { class: "tile-caption", text: generation.request.caption }),
      element("p", { class: "hint numbers", text: formatTime(generation.createdMs) }),
    );
    return [element("li", {}, tile)];
  });
}
