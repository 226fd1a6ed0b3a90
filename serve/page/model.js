/**
 * The served model: read from the server, shown in the footer, and what the form takes from it.
 */

import { ApiError, ConnectionLost, readModel } from "./api.js";
import { startBuilder } from "./builder.js";
import { grammarOf, reading, shortTitle, word } from "./composer.js";
import { whenReady } from "./connection.js";
import { button, byId, element, showBriefly } from "./elements.js";
import { askForKey } from "./keys.js";
import { limitSettings } from "./settings.js";
import { language, onLanguage, t } from "./texts.js";

const MOST_EXAMPLES = 6;

/** @typedef {import("./api.js").Model} Model */

/** @type {Model|null} */
let model = null;

/** @type {import("./composer.js").Grammar|null} */
let grammar = null;

/** @type {((grammar: import("./composer.js").Grammar|null) => void)[]} */
const listeners = [];

/**
 * @param {(grammar: import("./composer.js").Grammar|null) => void} listener called once the model is known, with the form
 *   of its captions
 */
export function onModel(listener) {
  listeners.push(listener);
}

/**
 * @param {string} name of an attribute or a value of the model
 * @returns {string} what it is called in the language shown
 */
export function wordShown(name) {
  return grammar ? word(grammar, name, language()) : name;
}

/**
 * @param {string} caption
 * @returns {string} what it says in the language shown; "" where it is in that language
 */
export function inLanguageShown(caption) {
  return reading(grammar, caption, language());
}

/**
 * @param {string} caption
 * @returns {HTMLElement|null} what it says in the language shown; null where it is in that language
 */
export function readingOf(caption) {
  const text = inLanguageShown(caption);
  return text ? element("p", { class: "reading", text }) : null;
}

/** @returns {Model|null} null until the server has answered */
export function servedModel() {
  return model;
}

/**
 * Reads the model, again after lost connections and refused keys, and gives the form its bounds, examples and
 * attributes.
 * @param {import("./caption.js").CaptionBox} captionBox
 * @returns {Promise<Model|null>} null without a key, or after an error, which was shown
 */
export async function loadModel(captionBox) {
  while (!model) {
    try {
      const found = await readModel();
      if (!model) useModel((model = found), captionBox);
    } catch (error) {
      if (error instanceof ConnectionLost) await whenReady();
      else if (error instanceof ApiError && error.status === 401) {
        if (!(await askForKey(true))) return null;
      } else {
        console.error(error);
        showBriefly(error instanceof ApiError ? error.text : t("error.connection"));
        return null;
      }
    }
  }
  return model;
}

/**
 * @param {Model} served
 * @param {import("./caption.js").CaptionBox} captionBox
 */
function useModel(served, captionBox) {
  limitSettings(served);
  grammar = grammarOf(served.caption_guide);
  captionBox.useGrammar(grammar);
  if (grammar) startBuilder(grammar, captionBox);
  for (const listener of listeners) listener(grammar);
  onLanguage(() => {
    showLanguageHint(served.caption_guide.examples);
    showExamples(served.caption_guide.examples, captionBox);
    byId("model-info").textContent = t("foot.model", {
      id: served.id,
      size: served.image_size,
      tokens: served.text_seq_len,
      device: served.device === "cpu" ? "CPU" : served.device,
    });
  });
}

/**
 * A reader of English must know that English is not what the model reads.
 * @param {string[]} examples
 */
function showLanguageHint(examples) {
  const isForeign = language() === "en" && examples.some((caption) => /[^\p{Script=Latin}\P{L}]/u.test(caption));
  const place = byId("caption-language");
  place.hidden = !isForeign;
  place.textContent = isForeign ? t(grammar ? "caption.language_form" : "caption.language") : "";
}

/**
 * @param {string[]} captions
 * @param {import("./caption.js").CaptionBox} captionBox
 */
function showExamples(captions, captionBox) {
  const hint = captions.length ? t("caption.example", { caption: captions[0] }) : t("caption.hint");
  byId("caption").setAttribute("placeholder", hint);
  byId("empty-hint").textContent = t(captions.length ? "board.empty_hint" : "board.empty_hint_alone");
  /** @param {string} caption */
  const use = (caption) => () => {
    captionBox.write(caption);
    byId("generate").focus();
  };
  const buttons = captions.slice(0, MOST_EXAMPLES).map((caption) => {
    const chip = button({ text: shortTitle(grammar, caption, language()), class: "chip", press: use(caption) });
    chip.title = caption;
    return chip;
  });
  byId("examples").replaceChildren(...buttons);
}
