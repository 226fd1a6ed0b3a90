/**
 * Copying a text, also without https, where browsers offer no clipboard to pages.
 */

import { element } from "./elements.js";

/**
 * @param {string} text
 * @param {HTMLElement} [root] the open dialog, if there is one: outside of it nothing can be selected
 * @returns {Promise<boolean>} whether it was copied
 */
export async function copyText(text, root = document.body) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers still copy what is selected.
    const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    root.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}
