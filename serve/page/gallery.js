/**
 * The gallery: every picture that this browser keeps, newest first.
 */

import { tileOf } from "./cards.js";
import { byId, element, removePictures } from "./elements.js";
import { onRoom } from "./rooms.js";
import { formatTime, onLanguage, t } from "./texts.js";

const DRAWINGS_AT_ONCE = 24;

/** @typedef {import("./store.js").Drawing} Drawing */

/**
 * @param {import("./store.js").Store} store
 * @param {Pick<import("./cards.js").Actions, "open"|"favour"|"download"> & {clear: () => void}} actions
 * @returns {{refresh: () => Promise<void>, tellFault: (text: string) => void}}
 */
export function startGallery(store, actions) {
  const grid = byId("gallery-grid");
  const only = /** @type {HTMLInputElement} */ (byId("only-favourites"));
  /** @type {Drawing[]} */
  let shown = [];
  let wish = 0;
  // Pictures are made when somebody looks; a drawing that ends meanwhile only counts.
  const isSeen = () => !byId("gallery").hidden;

  const isWanted = (picture) => (only.checked ? picture.isFavourite : picture.isShown || picture.isFavourite);
  const read = (before, count) => store.newest(before, count, (drawing) => drawing.pictures.some(isWanted));
  const count = async () => {
    const number = await store.count();
    byId("gallery-count").textContent = number ? String(number) : "";
    byId("gallery-summary").textContent = number ? t("gallery.summary", { n: number }) : "";
    byId("clear-gallery").hidden = number === 0;
  };
  const draw = async () => {
    removePictures(grid);
    for (const drawing of shown) grid.append(...itemsOf(drawing, isWanted, actions));
    byId("gallery-empty").hidden = shown.length > 0;
    const last = shown.at(-1);
    byId("gallery-more").hidden = !last || (await read(last.id, 1)).length === 0;
  };
  const refresh = async () => {
    const asked = ++wish;
    await count();
    if (!isSeen()) return;
    const found = await read(null, Math.max(DRAWINGS_AT_ONCE, shown.length));
    if (asked !== wish) return; // a later change has asked again
    shown = found;
    await draw();
  };
  byId("gallery-more").addEventListener("click", async () => {
    shown.push(...(await read(shown.at(-1).id, DRAWINGS_AT_ONCE)));
    await draw();
  });
  only.addEventListener("change", refresh);
  onRoom(refresh);
  byId("clear-gallery").addEventListener("click", actions.clear);
  const showWarning = () => {
    if (!store.isLasting) tellFault(t("gallery.not_lasting"));
  };
  onLanguage(() => {
    showWarning();
    void refresh();
  });
  return { refresh, tellFault };
}

/**
 * @param {string} text shown above the pictures; "" takes it back
 */
function tellFault(text) {
  const place = byId("gallery-fault");
  place.hidden = text === "";
  place.textContent = text;
}

function itemsOf(drawing, isWanted, actions) {
  return drawing.pictures.flatMap((picture, index) => {
    if (!isWanted(picture)) return [];
    const tile = tileOf(drawing, index, actions);
    tile.append(
      element("p", { class: "tile-caption", text: drawing.request.caption }),
      element("p", { class: "hint numbers", text: formatTime(drawing.createdMs) }),
    );
    return [element("li", {}, tile)];
  });
}
