/**
 * What the gallery shows: favourites, one collection, captions that have the words searched for.
 */

import { askName } from "./collections.js";
import { button, byId, element } from "./elements.js";
import { inLanguageShown } from "./model.js";
import { ask } from "./question.js";
import { isKept } from "./store.js";
import { onLanguage, t } from "./texts.js";

const PAUSE_MS = 150; // of typing, before everything is searched

/**
 * @typedef {object} Filters
 * @property {(image: import("./store.js").RankedImage) => boolean} isWanted
 * @property {(generation: import("./store.js").Generation) => boolean} isCaptionWanted
 * @property {() => boolean} isAny whether anything is left out
 * @property {() => Promise<void>} refresh reads the collections anew
 */

/**
 * @param {import("./store.js").Store} store
 * @param {() => void} onChange
 * @param {{stripCollection: (id: string) => Promise<void>, reportCollections: () => void}} actions
 * @returns {Filters}
 */
export function startFilters(store, onChange, actions) {
  const only = /** @type {HTMLInputElement} */ (byId("only-favourites"));
  const search = /** @type {HTMLInputElement} */ (byId("gallery-search"));
  const choice = /** @type {HTMLSelectElement} */ (byId("gallery-collection"));
  /** @type {import("./store.js").Collection[]} */
  let collections = [];
  const chosen = () => collections.find(({ id }) => id === choice.value);

  const rename = button({
    text: t("collection.rename"),
    press: async () => {
      const collection = chosen();
      const name = collection ? await askName(collection, collections) : "";
      if (!collection || !name) return;
      await store.putCollection({ ...collection, name });
      actions.reportCollections();
      onChange();
    },
    action: "rename-collection",
  });
  const remove = button({
    text: t("collection.remove"),
    class: "quiet danger",
    press: async () => {
      const collection = chosen();
      if (!collection) return;
      const text = t("collection.remove_text", { name: collection.name });
      const title = t("collection.remove_title");
      if (!(await ask({ title, text, yes: t("collection.remove_yes"), isGrave: true }))) return;
      await store.removeCollection(collection.id);
      actions.reportCollections();
      await actions.stripCollection(collection.id);
      choice.focus();
    },
    action: "remove-collection",
  });
  const tools = byId("collection-tools");
  tools.append(rename, remove);

  const show = () => {
    const value = choice.value;
    const options = collections.map(({ id, name }) => element("option", { value: id, text: name }));
    choice.replaceChildren(element("option", { value: "", text: t("collection.all") }), ...options);
    choice.value = collections.some(({ id }) => id === value) ? value : "";
    byId("gallery-collection-field").hidden = collections.length === 0;
    tools.hidden = choice.value === "";
  };
  only.addEventListener("change", onChange);
  choice.addEventListener("change", onChange);
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(onChange, PAUSE_MS);
  });
  onLanguage(() => {
    for (const [each, key] of /** @type {const} */ ([
      [rename, "collection.rename"],
      [remove, "collection.remove"],
    ]))
      each.replaceChildren(element("span", { text: t(key) }));
    show();
  });

  return {
    isWanted: (image) =>
      (only.checked ? image.isFavourite : isKept(image)) &&
      (choice.value === "" || Boolean(image.collections?.includes(choice.value))),
    isCaptionWanted: ({ request }) => {
      const words = wordsOf(search.value);
      if (!words.length) return true;
      const text = folded(`${request.caption} ${inLanguageShown(request.caption)}`);
      return words.every((word) => text.includes(word));
    },
    isAny: () => only.checked || choice.value !== "" || search.value.trim() !== "",
    refresh: async () => {
      collections = await store.collections();
      show();
    },
  };
}

/**
 * @param {string} text
 * @returns {string[]} what a caption must have, each somewhere
 */
function wordsOf(text) {
  return folded(text).split(/\s+/u).filter(Boolean);
}

/** @param {string} text */
function folded(text) {
  return text.normalize("NFC").toLowerCase();
}
