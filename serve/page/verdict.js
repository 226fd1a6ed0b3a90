/**
 * How well an image fits its caption, in words: the place of its score among those of real photographs with their own
 * captions, and how much of the caption the model has read. Nonsense never looks like a good fit: a caption of which the
 * model knows no word has no place, and one that it knows in part says so beside it.
 */

import { element } from "./elements.js";
import { formatNumber, formatScore, t } from "./texts.js";

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./store.js").RankedImage} RankedImage
 */

/**
 * @param {Generation} generation
 * @param {RankedImage} image
 * @returns {string} one sentence; "" for an image without a score
 */
export function verdictOf({ words }, { score, percentile }) {
  if (score === null) return "";
  if (words && words.known === 0) return t("verdict.nothing_read");
  if (percentile === null || percentile === undefined) return t("verdict.score", { score: formatScore(score) });
  const place = t("verdict.place", { percent: Math.floor(percentile) });
  if (!words || words.known === words.total) return place;
  return `${place} ${t("verdict.partly_read", { known: words.known, total: words.total })}`;
}

/**
 * @param {Generation} generation
 * @param {RankedImage} image
 * @returns {HTMLElement|null} the same, short, for a tile; null for an image without a score
 */
export function verdictElement(generation, image) {
  const { score, percentile } = image;
  if (score === null) return null;
  const { words } = generation;
  const isForeign = words !== null && words !== undefined && words.known === 0;
  const isPartly = words !== null && words !== undefined && words.known < words.total && !isForeign;
  let text = formatScore(score);
  if (isForeign) text = t("verdict.unread_short");
  else if (percentile !== null && percentile !== undefined)
    text = t("verdict.place_short", { percent: Math.floor(percentile) });
  if (isPartly) text += ` · ${formatNumber(words.known)}/${formatNumber(words.total)}`;
  const shown = element("span", { "aria-hidden": "true", text });
  const read = element("span", { class: "visually-hidden", text: verdictOf(generation, image) });
  const title = verdictOf(generation, image);
  return element("span", { class: isForeign || isPartly ? "score numbers doubtful" : "score numbers", title }, shown, read);
}

/**
 * @param {Generation} generation
 * @returns {string} which words of its caption the model does not know; "" where it knows them all
 */
export function unreadWords({ words }) {
  if (!words || words.known === words.total) return "";
  const named = words.unknown.slice(0, 8).join(", ") + (words.unknown.length > 8 ? ", …" : "");
  return t(words.known ? "verdict.unread_some" : "verdict.unread_all", { words: named });
}
