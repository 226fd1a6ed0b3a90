/**
 * Collections: named sets of images, of which an image can be in several. Their names are in the store, and each image has
 * the ids of those that it is in.
 */

import { element } from "./elements.js";
import { ask } from "./question.js";
import { t } from "./texts.js";

const MOST_NAME = 40; // characters

/**
 * @typedef {import("./store.js").Collection} Collection
 * @typedef {import("./library.js").Picture} Picture
 * @typedef {{added: Set<string>, removed: Set<string>, created: string}} Choice `created`: name of a new one; "" for none
 */

/**
 * Asks into which collections images belong.
 * @param {Collection[]} collections
 * @param {Picture[]} pictures
 * @returns {Promise<Choice|null>} null when the user cancels
 */
export async function chooseCollections(collections, pictures) {
  const boxes = collections.map(({ id, name }) => {
    const numIn = pictures.filter(({ image }) => image.collections?.includes(id)).length;
    const input = element("input", { type: "checkbox", value: id, checked: numIn === pictures.length });
    input.indeterminate = numIn > 0 && numIn < pictures.length; // left so, each image stays where it is
    return { input, label: element("label", { class: "check" }, input, element("span", { text: name })) };
  });
  const created = nameInput("");
  created.id = "collection-new";
  const isAnswered = await ask({
    title: t("collection.title"),
    text: t("collection.text", { n: pictures.length }),
    body: [
      element(
        "fieldset",
        { class: "collection-choice", hidden: boxes.length === 0 },
        element("legend", { class: "visually-hidden", text: t("collection.title") }),
        ...boxes.map(({ label }) => label),
      ),
      element("div", { class: "field" }, element("label", { for: "collection-new", text: t("collection.new") }), created),
    ],
    yes: t("collection.yes"),
    focus: boxes[0]?.input ?? created,
  });
  if (!isAnswered) return null;
  const inputs = boxes.map(({ input }) => input);
  const settled = inputs.filter((input) => !input.indeterminate);
  const choice = {
    added: new Set(settled.filter((input) => input.checked).map((input) => input.value)),
    removed: new Set(settled.filter((input) => !input.checked).map((input) => input.value)),
    created: tidy(created.value),
  };
  const same = named(collections, choice.created);
  if (!same) return choice;
  choice.added.add(same.id);
  choice.removed.delete(same.id);
  return { ...choice, created: "" };
}

/**
 * Asks for another name.
 * @param {Collection} collection
 * @param {Collection[]} collections
 * @returns {Promise<string>} "" when it stays as it is
 */
export async function askName(collection, collections) {
  const input = nameInput(collection.name);
  input.id = "collection-name";
  input.required = true;
  const fault = element("p", { class: "fault", role: "status" });
  input.addEventListener("input", () => {
    const same = named(collections, tidy(input.value));
    const text = same && same.id !== collection.id ? t("collection.taken") : "";
    input.setCustomValidity(text);
    fault.textContent = text;
  });
  const isAnswered = await ask({
    title: t("collection.rename_title"),
    text: t("collection.rename_text"),
    body: [
      element("div", { class: "field" }, element("label", { for: "collection-name", text: t("collection.name") }), input),
      fault,
    ],
    yes: t("collection.rename_yes"),
    focus: input,
  });
  const name = tidy(input.value);
  return isAnswered && name !== collection.name ? name : "";
}

/**
 * @param {string} value
 * @returns {HTMLInputElement}
 */
function nameInput(value) {
  return element("input", { type: "text", maxlength: MOST_NAME, autocomplete: "off", spellcheck: "false", value });
}

/**
 * @param {Collection[]} collections
 * @param {string} name
 * @returns {Collection|undefined} the one of that name, in capital letters or small ones
 */
function named(collections, name) {
  return collections.find((each) => each.name.toLowerCase() === name.toLowerCase());
}

/** @param {string} name */
function tidy(name) {
  return name.normalize("NFC").replace(/\s+/gu, " ").trim();
}
