/**
 * Images as tiles: each opens, with its rank, its score, a star and a download; an edit's beside the image that it began with.
 */

import { compareWithSource } from "./compare.js";
import { button, element, imageElement } from "./elements.js";
import { inLanguageShown } from "./model.js";
import { t } from "./texts.js";
import { verdictElement } from "./verdict.js";

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {Pick<import("./cards.js").Actions, "open"|"favour"|"download">} TileActions
 */

/**
 * @param {Generation} generation
 * @param {import("./store.js").RankedImage[]} images
 * @param {TileActions} actions
 */
export function tilesOf(generation, images, actions) {
  const tiles = images.map((each) => tileOf(generation, generation.images.indexOf(each), actions));
  const source = images[0]?.isShown ? sourceTile(generation) : null;
  if (source) tiles.unshift(source);
  return element("ul", { class: "tiles", "data-n": tiles.length }, ...tiles.map((tile) => element("li", {}, tile)));
}

/**
 * @param {Generation} generation
 * @returns {HTMLElement|null} its init image, beside what became of it; null where it has none
 */
function sourceTile(generation) {
  const { image } = generation.request;
  if (!image) return null;
  const best = generation.images.findIndex((each) => each.isShown);
  const open = element(
    "button",
    {
      type: "button",
      class: "image",
      "data-action": "compare-source",
      "aria-label": t("source.compare"),
      on: { click: () => compareWithSource(generation, best) },
    },
    imageElement(image, t("source.name")),
  );
  const name = element("span", { class: "rank", text: t("source.name") });
  return element("figure", { class: "tile source" }, open, element("figcaption", {}, name));
}

/**
 * @param {Generation} generation
 * @param {number} index of the image
 * @param {TileActions} actions
 * @returns {HTMLElement} an image that opens, with its rank, its score, and a star
 */
export function tileOf(generation, index, actions) {
  const shown = generation.images[index];
  const { caption } = generation.request;
  const alt = t("image.alt", { caption: inLanguageShown(caption) || caption, rank: shown.rank });
  const open = element(
    "button",
    {
      type: "button",
      class: "image",
      "data-action": `open-${index}`,
      "aria-label": t("image.open", { alt }),
      on: { click: () => actions.open(generation, index) },
    },
    imageElement(shown.blob, alt),
  );
  const star = button({
    icon: "star",
    label: t("image.favourite", { rank: shown.rank }),
    class: "quiet icon-only star",
    pressed: shown.isFavourite,
    action: `star-${index}`,
    press: () => actions.favour(generation, index, !shown.isFavourite),
  });
  const save = button({
    icon: "download",
    label: t("image.download", { rank: shown.rank }),
    class: "quiet icon-only",
    action: `download-${index}`,
    press: () => actions.download(generation, index),
  });
  return element(
    "figure",
    { class: "tile" },
    open,
    element(
      "figcaption",
      {},
      element("span", { class: "rank", text: t("image.rank", { rank: shown.rank }) }),
      verdictElement(generation, shown),
      star,
      save,
    ),
  );
}
