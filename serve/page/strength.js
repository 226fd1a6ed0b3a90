/**
 * The editor's third way: the model chooses which cells of an init image are generated anew, by their likelihood.
 */

import { byId, element } from "./elements.js";
import { formatNumber, t } from "./texts.js";

/** What the slider starts from: enough to see a difference, little enough to recognise the image. */
export const STRENGTH = 0.4;

/**
 * @typedef {object} Choice
 * @property {number} strength share of the cells
 * @property {boolean} isOnlyChanged whether only what the caption's changed words touch is generated anew
 */

/**
 * @param {Choice} choice
 * @param {string} before the caption that the editor was opened with
 * @param {() => void} changed
 * @returns {HTMLElement}
 */
export function strengthPanel(choice, before, changed) {
  const slider = element("input", {
    id: "strength",
    type: "range",
    min: 0.05,
    max: 1,
    step: 0.05,
    value: choice.strength,
    "aria-describedby": "strength-tokens",
  });
  slider.addEventListener("input", () => {
    choice.strength = Number(slider.value);
    changed();
  });
  const box = element("input", { id: "only-changed", type: "checkbox", "aria-describedby": "only-changed-hint" });
  box.checked = choice.isOnlyChanged;
  box.addEventListener("change", () => {
    choice.isOnlyChanged = box.checked;
    changed();
  });
  const hint = t("editor.only_changed_hint", { caption: before || t("card.no_caption") });
  return element(
    "div",
    { id: "editor-strength", class: "field" },
    element("label", { for: "strength", text: t("editor.strength") }),
    slider,
    element("p", { id: "strength-tokens", class: "hint" }),
    element("label", { class: "check" }, box, element("span", { text: t("editor.only_changed") })),
    element("p", { id: "only-changed-hint", class: "hint", text: hint }),
  );
}

/**
 * Shows the choice in the panel.
 * @param {Choice} choice
 * @param {number} numCells
 */
export function showStrength({ strength, isOnlyChanged }, numCells) {
  const n = Math.round(strength * numCells);
  const percent = formatNumber(Math.round(strength * 100));
  byId("strength").toggleAttribute("disabled", isOnlyChanged);
  byId("strength").setAttribute("aria-valuetext", `${percent}%`);
  byId("strength-tokens").textContent = isOnlyChanged
    ? t("editor.strength_changed")
    : t("editor.strength_tokens", { n, total: numCells, percent });
}

/**
 * @param {Choice} choice
 * @param {string} before
 * @param {string} caption
 * @returns {string} why nothing can be generated yet; "" when it can
 */
export function strengthFault({ isOnlyChanged }, before, caption) {
  if (!isOnlyChanged) return "";
  if (!before) return t("editor.no_caption_before");
  return before === caption ? t("editor.unchanged") : "";
}
