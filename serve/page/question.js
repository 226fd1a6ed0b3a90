/**
 * One question at a time, in a dialog that holds the focus until it is answered. Esc says no.
 */

import { button, byId, element, fillDialog } from "./elements.js";
import { t } from "./texts.js";

/**
 * @param {{title: string, text: string, yes: string, body?: Node[], focus?: HTMLElement, isGrave?: boolean}} about
 *   `isGrave`: yes destroys something, so no has the focus
 * @returns {Promise<boolean>}
 */
export function ask(about) {
  return new Promise((resolve) => {
    const dialog = /** @type {HTMLDialogElement} */ (byId("question"));
    const no = button({ text: t("no"), class: "secondary", press: () => dialog.close("no") });
    const yes = element("button", {
      type: "submit",
      class: about.isGrave ? "primary grave" : "primary",
      text: about.yes,
    });
    const form = element(
      "form",
      {
        novalidate: true,
        on: {
          submit: (event) => {
            event.preventDefault();
            if (/** @type {HTMLFormElement} */ (event.target).checkValidity()) dialog.close("yes");
            else about.focus?.focus();
          },
        },
      },
      element("h2", { id: "question-title", text: about.title }),
      element("p", { text: about.text }),
      ...(about.body ?? []),
      element("div", { class: "actions" }, no, yes),
    );
    fillDialog("question", form);
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
    (about.focus ?? (about.isGrave ? no : yes)).focus();
  });
}
