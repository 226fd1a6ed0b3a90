/**
 * One question at a time, in a dialog that holds the focus until it is answered. Esc says no.
 */

import { button, byId, element, fillDialog } from "./elements.js";
import { t } from "./texts.js";

/**
 * @param {{title: string, text: string, yes: string, body?: Node[], focus?: HTMLElement, isGrave?: boolean}} options
 *   `isGrave`: "yes" deletes something, so "no" has the focus
 * @returns {Promise<boolean>}
 */
export function ask(options) {
  return new Promise((resolve) => {
    const dialog = /** @type {HTMLDialogElement} */ (byId("question"));
    const no = button({ text: t("no"), class: "secondary", press: () => dialog.close("no") });
    const yes = element("button", {
      type: "submit",
      class: options.isGrave ? "primary grave" : "primary",
      text: options.yes,
    });
    const form = element(
      "form",
      {
        novalidate: true,
        on: {
          submit: (/** @type {Event} */ event) => {
            event.preventDefault();
            if (/** @type {HTMLFormElement} */ (event.target).checkValidity()) dialog.close("yes");
            else options.focus?.focus();
          },
        },
      },
      element("h2", { id: "question-title", text: options.title }),
      element("p", { text: options.text }),
      ...(options.body ?? []),
      element("div", { class: "actions" }, no, yes),
    );
    fillDialog("question", form);
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
    (options.focus ?? (options.isGrave ? no : yes)).focus();
  });
}
