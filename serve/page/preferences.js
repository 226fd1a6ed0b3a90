/**
 * What a person chose, kept for the next visit: language, theme, folds, and the form.
 *
 * Storage may be closed to the page (private windows, policies): then choices last as long as the page, and nothing
 * fails.
 */

import { byId, icon } from "./elements.js";
import { language, onLanguage, setLanguage, t } from "./texts.js";

const THEMES = ["auto", "light", "dark"];

/**
 * @param {Storage|null} storage
 * @param {string} name
 * @returns {string} "" when there is nothing, or no storage
 */
export function kept(storage, name) {
  try {
    return storage?.getItem(name) ?? "";
  } catch {
    return "";
  }
}

/**
 * @param {Storage|null} storage
 * @param {string} name
 * @param {string} value
 * @returns {boolean} whether it was kept
 */
export function keep(storage, name, value) {
  try {
    storage?.setItem(name, value);
    return storage !== null;
  } catch {
    return false;
  }
}

/**
 * @param {Storage|null} storage
 * @param {string} name
 */
export function forget(storage, name) {
  try {
    storage?.removeItem(name);
  } catch {
    // Nothing can be kept there, so nothing is.
  }
}

/** @returns {Storage|null} */
export function lasting() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

/** Makes the header's language and theme buttons work. */
export function startPreferences() {
  byId("language-button").addEventListener("click", () => {
    const next = language() === "ko" ? "en" : "ko";
    keep(lasting(), "kodalle.language", next);
    setLanguage(next);
  });
  byId("theme-button").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    keep(lasting(), "kodalle.theme", next);
    showButtons();
  });
  onLanguage(showButtons);
}

/** @returns {"auto"|"light"|"dark"} */
function theme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "light" || chosen === "dark" ? chosen : "auto";
}

function showButtons() {
  const other = byId("language-button");
  other.textContent = language() === "ko" ? "English" : "한국어";
  other.lang = language() === "ko" ? "en" : "ko";
  const icons = /** @type {const} */ ({ auto: "contrast", light: "sun", dark: "moon" });
  const themes = byId("theme-button");
  themes.replaceChildren(icon(icons[theme()]));
  themes.setAttribute("aria-label", t(`theme.${theme()}`));
  themes.title = t(`theme.${theme()}`);
}
