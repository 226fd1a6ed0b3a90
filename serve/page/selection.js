/**
 * Images chosen in the gallery, and what is done with them at once.
 *
 * Each has a checkbox. Space chooses, with Shift everything from the last one; arrows move between them, with Shift they choose
 * on the way; Ctrl+A chooses all in view, Enter leads to the actions, Delete asks once, Esc lets go. What a filter hides stays
 * chosen, and is counted.
 */

import { announce, button, byId, element, showBriefly } from "./elements.js";
import { inLanguageShown } from "./model.js";
import { onLanguage, t } from "./texts.js";

const MOST_COMPARED = 4;

/**
 * @typedef {import("./library.js").Picture} Picture
 *
 * @typedef {object} SelectionActions
 * @property {(pictures: Picture[]) => void} compare
 * @property {(pictures: Picture[]) => Promise<void>} collect
 * @property {(pictures: Picture[]) => Promise<void>} saveZip
 * @property {(pictures: Picture[]) => Promise<void>} savePdf
 * @property {(pictures: Picture[]) => Promise<boolean>} removeImages
 *
 * @typedef {object} Selection
 * @property {(picture: Picture) => string} keyOf
 * @property {(picture: Picture) => HTMLElement} boxOf its checkbox, in a label
 * @property {(pictures: Picture[]) => void} show those in view, in order
 * @property {() => Promise<void>} refresh reads what is chosen anew: other windows change it too
 */

/**
 * @param {HTMLElement} grid
 * @param {import("./store.js").Store} store
 * @param {SelectionActions} actions
 * @returns {Selection}
 */
export function startSelection(grid, store, actions) {
  const bar = byId("selection");
  /** @type {Map<string, Picture>} */
  const chosen = new Map();
  /** @type {Map<string, Picture>} */
  let inView = new Map();
  let anchor = ""; // key of the last one that was chosen by itself
  let isShift = false;

  const boxes = () => /** @type {HTMLInputElement[]} */ ([...grid.querySelectorAll("[data-action=select]")]);
  /** @param {Element} box */
  const keyAt = (box) => box.closest("[data-picture]")?.getAttribute("data-picture") ?? "";
  const pictures = () => [...chosen.values()].sort((one, other) => (keyOf(one) < keyOf(other) ? 1 : -1));

  const showChosen = () => {
    for (const box of boxes()) {
      box.checked = chosen.has(keyAt(box));
      box.closest("[data-picture]")?.classList.toggle("chosen", box.checked);
    }
    grid.classList.toggle("choosing", chosen.size > 0);
    const numHidden = [...chosen.keys()].filter((key) => !inView.has(key)).length;
    const parts = [t("selection.count", { n: chosen.size }), numHidden ? t("selection.hidden", { n: numHidden }) : ""];
    byId("selection-count").textContent = parts.filter(Boolean).join(" · ");
    bar.hidden = chosen.size === 0;
    const mayCompare = chosen.size >= 2 && chosen.size <= MOST_COMPARED;
    const compare = bar.querySelector("[data-action=compare]");
    compare?.toggleAttribute("disabled", !mayCompare);
    byId("selection-hint").textContent = t(mayCompare ? "selection.hint" : "selection.hint_compare");
  };
  /**
   * @param {string} key
   * @param {boolean} isChosen
   */
  const choose = (key, isChosen) => {
    const picture = inView.get(key);
    if (isChosen && picture) chosen.set(key, picture);
    else chosen.delete(key);
  };
  /**
   * @param {string} key
   * @param {boolean} isChosen
   */
  const chooseTo = (key, isChosen) => {
    const keys = [...inView.keys()];
    const [one, other] = [keys.indexOf(anchor), keys.indexOf(key)];
    if (one < 0) return choose(key, isChosen);
    for (const each of keys.slice(Math.min(one, other), Math.max(one, other) + 1)) choose(each, isChosen);
  };
  const changed = () => {
    showChosen();
    announce(byId("selection-count").textContent ?? "");
  };
  const chooseAll = () => {
    for (const [key, picture] of inView) chosen.set(key, picture);
    changed();
  };
  const letGo = () => {
    chosen.clear();
    changed();
    (boxes().find((box) => keyAt(box) === anchor) ?? boxes()[0])?.focus();
  };
  const removeChosen = async () => {
    if (chosen.size && (await actions.removeImages(pictures()))) byId("gallery-title").focus();
  };

  grid.addEventListener("keydown", (event) => {
    isShift = event.shiftKey;
    const box = event.target;
    if (!(box instanceof HTMLInputElement) || !box.matches("[data-action=select]")) return;
    const next = event.key.startsWith("Arrow") ? neighbour(boxes(), box, event.key) : null;
    if (event.key === "Escape" && chosen.size) letGo();
    else if (event.key === "Delete") void removeChosen();
    else if (event.key === "Enter") /** @type {HTMLElement|null} */ (bar.querySelector("button:enabled"))?.focus();
    else if (event.key.toLowerCase() === "a" && (event.ctrlKey || event.metaKey)) chooseAll();
    else if (next) {
      next.focus();
      if (event.shiftKey) {
        if (!anchor || !chosen.has(anchor)) anchor = keyAt(box);
        chooseTo(keyAt(next), true);
        changed();
      }
    } else return;
    event.preventDefault();
  });
  for (const name of /** @type {const} */ (["keyup", "pointerdown"]))
    grid.addEventListener(name, (event) => (isShift = event.shiftKey));
  grid.addEventListener("change", (event) => {
    const box = event.target;
    if (!(box instanceof HTMLInputElement) || !box.matches("[data-action=select]")) return;
    const key = keyAt(box);
    if (isShift) chooseTo(key, box.checked);
    else {
      choose(key, box.checked);
      anchor = key;
    }
    changed();
  });
  bar.addEventListener("keydown", (event) => {
    if (event.key === "Escape") letGo();
  });
  byId("select-shown").addEventListener("click", () => {
    chooseAll();
    /** @type {HTMLElement|null} */ (bar.querySelector("button:enabled"))?.focus();
  });

  /** @param {(pictures: Picture[]) => Promise<void>} save */
  const saving = (save) => async (/** @type {Event} */ event) => {
    const pressed = /** @type {HTMLButtonElement} */ (event.currentTarget);
    pressed.setAttribute("aria-disabled", "true");
    showBriefly(t("selection.saving", { n: chosen.size }));
    try {
      await save(pictures());
    } catch (error) {
      console.error(error);
      showBriefly(t("selection.not_saved"));
    }
    pressed.removeAttribute("aria-disabled");
  };
  onLanguage(() => {
    const compare = () => actions.compare(pictures());
    byId("selection-actions").replaceChildren(
      button({ icon: "compare", text: t("selection.compare"), press: compare, action: "compare" }),
      button({ icon: "layers", text: t("selection.collect"), press: () => actions.collect(pictures()), action: "collect" }),
      button({ icon: "download", text: t("selection.zip"), press: saving(actions.saveZip), action: "zip" }),
      button({ icon: "download", text: t("selection.pdf"), press: saving(actions.savePdf), action: "pdf" }),
      button({ icon: "bin", text: t("selection.remove"), class: "quiet danger", press: removeChosen, action: "remove-chosen" }),
      button({ icon: "close", text: t("selection.clear"), press: letGo, action: "let-go" }),
    );
    showChosen();
  });

  return {
    keyOf,
    boxOf: (picture) => {
      const { caption } = picture.generation.request;
      const name = t("image.alt", { caption: inLanguageShown(caption) || caption, rank: picture.image.rank });
      const isChosen = chosen.has(keyOf(picture));
      const box = element("input", {
        type: "checkbox",
        "data-action": "select",
        "aria-label": t("selection.select", { name }),
        checked: isChosen,
      });
      return element("label", { class: "select-box" }, box);
    },
    show: (found) => {
      inView = new Map(found.map((picture) => [keyOf(picture), picture]));
      queueMicrotask(showChosen); // once their checkboxes are there
    },
    refresh: async () => {
      for (const [key, { generation, image }] of [...chosen]) {
        const now = await store.get(generation.id);
        if (!chosen.has(key)) continue; // let go meanwhile
        const same = now?.images.find(({ candidate }) => candidate === image.candidate);
        if (now && same) chosen.set(key, { generation: now, image: same });
        else chosen.delete(key);
      }
      showChosen();
    },
  };
}

/**
 * @param {Picture} picture
 * @returns {string} the newest first when sorted downwards, and the best first within a generation
 */
function keyOf({ generation, image }) {
  return `${generation.id}-${String(9999 - image.rank)}`;
}

/**
 * @param {HTMLInputElement[]} boxes
 * @param {HTMLInputElement} from
 * @param {string} key
 * @returns {HTMLInputElement|undefined} the one in that direction
 */
function neighbour(boxes, from, key) {
  const at = boxes.indexOf(from);
  if (key === "ArrowLeft" || key === "ArrowRight") return boxes[at + (key === "ArrowLeft" ? -1 : 1)];
  const here = from.getBoundingClientRect();
  const isBeyond = (/** @type {DOMRect} */ box) => (key === "ArrowDown" ? box.top > here.top + 4 : box.top < here.top - 4);
  const found = boxes
    .map((box) => ({ box, place: box.getBoundingClientRect() }))
    .filter(({ place }) => isBeyond(place))
    .sort((one, other) => distance(one.place, here) - distance(other.place, here));
  return found[0]?.box;
}

/**
 * @param {DOMRect} one
 * @param {DOMRect} other
 * @returns {number} rows count far more than columns
 */
function distance(one, other) {
  return Math.abs(one.top - other.top) * 100 + Math.abs(one.left - other.left);
}
