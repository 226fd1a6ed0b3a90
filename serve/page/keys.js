/**
 * The API key: requested when the server needs one, kept for this tab, or for this browser when the user says so.
 */

import { byId, element } from "./elements.js";
import { ask } from "./question.js";
import { kept, keep, forget } from "./preferences.js";
import { onLanguage, t } from "./texts.js";

const NAME = "kodalle.key";
/** @type {Promise<boolean>|null} */
let asking = null;
let inMemory = ""; // where both storages are closed to the page

/** @returns {string} "" when there is none */
export function currentKey() {
  return kept(sessionStorageOrNull(), NAME) || kept(localStorageOrNull(), NAME) || inMemory;
}

/**
 * Requests a key from the user, once however many requests were refused.
 * @param {boolean} wasRefused the key in use was not accepted
 * @returns {Promise<boolean>} whether one was entered
 */
export function askForKey(wasRefused) {
  asking ??= askOnce(wasRefused).finally(() => {
    asking = null;
  });
  return asking;
}

/**
 * @param {boolean} wasRefused
 * @returns {Promise<boolean>}
 */
async function askOnce(wasRefused) {
  const input = element("input", {
    id: "key-input",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
  });
  const remember = element("input", { id: "key-remember", type: "checkbox" });
  const isAnswered = await ask({
    title: t("key.title"),
    text: wasRefused && currentKey() ? t("key.refused") : t("key.wanted"),
    body: [
      element("div", { class: "field" }, element("label", { for: "key-input", text: t("key.label") }), input),
      element("label", { class: "check" }, remember, " ", element("span", { text: t("key.remember") })),
      element("p", { class: "hint", text: t("key.where") }),
    ],
    yes: t("key.use"),
    focus: input,
  });
  const key = input.value.trim();
  if (!isAnswered || !key) return false;
  forgetKey();
  const place = remember.checked ? localStorageOrNull() : sessionStorageOrNull();
  if (!keep(place, NAME, key)) inMemory = key;
  showButton();
  return true;
}

/** Removes the key from everywhere. */
export function forgetKey() {
  forget(sessionStorageOrNull(), NAME);
  forget(localStorageOrNull(), NAME);
  inMemory = "";
  showButton();
}

/** Makes the header's button work: it shows that a key is in use, and removes it. */
export function startKeys() {
  byId("key-button").addEventListener("click", async () => {
    const isAnswered = await ask({
      title: t("key.forget_title"),
      text: t("key.forget_text"),
      yes: t("key.forget"),
      isGrave: true,
    });
    if (isAnswered) forgetKey();
  });
  onLanguage(showButton);
}

function showButton() {
  byId("key-button").hidden = !currentKey();
}

/** @returns {Storage|null} */
function sessionStorageOrNull() {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
}

/** @returns {Storage|null} */
function localStorageOrNull() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}
