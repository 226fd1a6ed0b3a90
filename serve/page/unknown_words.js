/**
 * Words of the caption that the model does not know, beneath the caption while it is written, each with what it would
 * understand instead.
 *
 * The server names them (POST /v1/tokenize). A suggestion that is a value of the model's attributes becomes a sentence of
 * its form; any other takes the word's place.
 */

import { captionOf, ownWords, placeOf, reading, withValue, word } from "./composer.js";
import { button, byId, element } from "./elements.js";
import { kept, lasting } from "./preferences.js";
import { language, t } from "./texts.js";

/**
 * @typedef {import("./composer.js").Grammar} Grammar
 * @typedef {{word: string, start: number, end: number, suggestion: string|null, value: string|null}} UnknownWord
 *   at these code points of the prompt in its normal form; as in the API
 */

/**
 * @param {UnknownWord[]} unknown of `caption`
 * @param {number} numKnown words that the model knows
 * @param {string} caption in its normal form
 * @param {Grammar|null} grammar
 * @param {(caption: string) => void} write
 */
export function showUnknownWords(unknown, numKnown, caption, grammar, write) {
  const place = byId("caption-unknown");
  const focused = place.contains(document.activeElement);
  const height = place.offsetHeight;
  place.hidden = unknown.length === 0;
  const words = [...new Map(unknown.map((each) => [each.word, each])).values()];
  const text = words.length ? t(numKnown ? "unknown.some" : "unknown.all", { n: words.length }) : "";
  const summary = byId("caption-unknown-text");
  // Read out once, not with each letter.
  if (summary.textContent !== text) summary.textContent = text;
  const items = words.map((each) => element("li", {}, wordOf(each, caption, grammar, write)));
  byId("caption-unknown-words").replaceChildren(...items);
  const values = words.flatMap(({ value }) => (value && grammar && placeOf(grammar, value) ? [value] : []));
  const all = byId("caption-unknown-all");
  all.hidden = values.length === 0 || grammar === null;
  all.replaceChildren();
  if (grammar && values.length) {
    const composed = captionOf(grammar, caption, values, kept(lasting(), "kodalle.subject"));
    all.append(
      element("span", { class: "composed", text: composed }),
      element("span", { class: "reading", text: reading(grammar, composed, language()) }),
      button({ text: t("unknown.use_all"), class: "secondary", press: () => write(composed), action: "use-known" }),
    );
  }
  // The button that was pressed is gone: the keyboard goes on in the caption.
  if (focused && !place.contains(document.activeElement)) byId("caption").focus();
  // What it pushed down must not end behind a bar.
  if (place.offsetHeight !== height && byId("compose").contains(document.activeElement))
    document.activeElement?.scrollIntoView({ block: "nearest" });
}

/**
 * @param {UnknownWord} unknown
 * @param {string} caption
 * @param {Grammar|null} grammar
 * @param {(caption: string) => void} write
 * @returns {HTMLElement} the word, marked, with a button for what to write instead
 */
function wordOf(unknown, caption, grammar, write) {
  const marked = element("mark", { text: unknown.word });
  const to = unknown.value && grammar ? placeOf(grammar, unknown.value, preferred(grammar, caption)) : null;
  if (to && grammar && unknown.value) {
    const { value } = unknown;
    const text = `${word(grammar, to.attribute, language())}: ${word(grammar, value, language())}`;
    const stated = { subject: to.subject, attribute: to.attribute, value: to.isList ? [value] : value };
    return offer(marked, unknown.word, text, () => write(withValue(grammar, without(unknown, caption), stated)));
  }
  const { suggestion } = unknown;
  if (suggestion === null) return marked;
  return offer(marked, unknown.word, suggestion, () => write(without(unknown, caption, suggestion)));
}

/**
 * @param {HTMLElement} marked
 * @param {string} from
 * @param {string} to
 * @param {() => void} press
 */
function offer(marked, from, to, press) {
  const made = button({ text: to, class: "chip", press, action: `replace-${from}` });
  made.setAttribute("aria-label", t("unknown.replace", { from, to }));
  return element("span", { class: "offered" }, marked, element("span", { "aria-hidden": "true", text: "→" }), made);
}

/**
 * @param {UnknownWord} unknown
 * @param {string} caption
 * @param {string} [instead]
 * @returns {string} the caption without the word, or with another
 */
function without({ start, end }, caption, instead = "") {
  const letters = [...caption];
  const before = letters.slice(0, start).join("");
  const after = letters.slice(end).join("");
  // Of a compound the rest is a word of its own; punctuation stays where it is.
  const left = /[\p{L}\p{N}]$/u.test(before) ? " " : "";
  const right = /^[\p{L}\p{N}]/u.test(after) ? " " : "";
  return `${before}${left}${instead}${right}${after}`.replace(/\s+/gu, " ").trim();
}

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @returns {string[]} subjects that a new sentence is likely about: those that the caption is about, then the form's
 */
function preferred(grammar, caption) {
  const rest = ownWords(grammar, caption);
  const stated = grammar.subjects.map(({ name }) => name).filter((name) => caption !== rest && caption.includes(name));
  return [...stated, kept(lasting(), "kodalle.subject")];
}
