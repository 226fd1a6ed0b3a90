/**
 * The caption box: how long the caption is in characters and in the model's tokens, which of its words the model does not
 * know, and what it says in the language shown, before it is sent.
 *
 * Characters beyond the limit are reported, never cut: a cut would hide what was pasted, and break a syllable that is
 * still being composed. Tokens are counted by the server, with the model's own tokenizer.
 */

import { countTokens } from "./api.js";
import { reading } from "./composer.js";
import { byId } from "./elements.js";
import { forget, keep, kept, lasting } from "./preferences.js";
import { language, onLanguage, t } from "./texts.js";
import { showUnknownWords } from "./unknown_words.js";

/** As in KoDALLE's published demo. */
export const MOST_CHARACTERS = 200;
const PAUSE_MS = 250;
const DRAFT = "kodalle.caption";

/**
 * @typedef {import("./api.js").PromptTokens} PromptTokens
 *
 * @typedef {object} CaptionBox
 * @property {() => string} read the caption as it is sent: one line, NFC
 * @property {(caption: string) => void} write
 * @property {() => string|null} fault why no image can be generated from it; null when one can
 * @property {() => void} showFault
 * @property {(listener: (caption: string) => void) => void} onChange
 * @property {(grammar: import("./composer.js").Grammar|null) => void} useGrammar of the served model
 */

/** @returns {CaptionBox} */
export function startCaption() {
  const box = /** @type {HTMLTextAreaElement} */ (byId("caption"));
  /** @type {((caption: string) => void)[]} */
  const listeners = [];
  const state = {
    tokens: /** @type {{caption: string, counted: PromptTokens}|null} */ (null),
    grammar: /** @type {import("./composer.js").Grammar|null} */ (null),
    isFaultShown: false,
  };
  const read = () => box.value.normalize("NFC").replace(/\s+/gu, " ").trim();
  const fault = () => {
    const length = [...read()].length;
    if (!length) return t("caption.missing");
    return length > MOST_CHARACTERS
      ? t("caption.too_long", { over: length - MOST_CHARACTERS, limit: MOST_CHARACTERS })
      : null;
  };
  const show = () => {
    const length = [...read()].length;
    const isOver = length > MOST_CHARACTERS;
    byId("caption-count").textContent = t("caption.count", { n: length, limit: MOST_CHARACTERS });
    byId("caption-count").classList.toggle("over", isOver);
    showTokens(state.tokens?.counted ?? null);
    const { caption, counted } = state.tokens ?? { caption: "", counted: null };
    // What was counted may be older than what is written by now.
    const replace = (/** @type {string} */ by) => (read() === caption ? write(by) : undefined);
    showUnknownWords(counted?.unknown ?? [], counted?.words_known ?? 0, caption, state.grammar, replace);
    byId("caption-reading").textContent = reading(state.grammar, read(), language());
    const isShown = isOver || (state.isFaultShown && length === 0);
    const place = byId("caption-fault");
    place.hidden = !isShown;
    place.textContent = isShown ? fault() : "";
    box.setAttribute("aria-invalid", String(isShown));
  };
  const count = tokenCounter((caption, counted) => {
    state.tokens = counted && { caption, counted };
    show();
  });
  /** @param {string} caption */
  const write = (caption) => {
    box.value = caption;
    changed();
  };
  const changed = () => {
    const caption = read();
    if (caption) keep(lasting(), DRAFT, caption);
    else forget(lasting(), DRAFT);
    state.isFaultShown &&= caption === "";
    show();
    count(caption);
    for (const listener of listeners) listener(caption);
  };
  box.addEventListener("input", changed);
  box.value = kept(lasting(), DRAFT);
  onLanguage(show);
  count(read());
  return {
    read,
    write,
    fault,
    showFault: () => {
      state.isFaultShown = true;
      show();
      box.focus({ preventScroll: true });
      box.scrollIntoView({ block: "nearest" });
    },
    onChange: (listener) => void listeners.push(listener),
    useGrammar: (grammar) => {
      state.grammar = grammar;
      show();
    },
  };
}

/**
 * @param {PromptTokens|null} counted null: not known, or an empty caption
 */
function showTokens(counted) {
  const place = byId("caption-tokens");
  const isOver = counted !== null && counted.tokens > counted.limit;
  place.classList.toggle("warning", isOver);
  if (counted === null) place.textContent = "";
  else if (isOver) place.textContent = t("caption.tokens_over", { n: counted.tokens, limit: counted.limit });
  else place.textContent = t("caption.tokens", { n: counted.tokens, limit: counted.limit });
}

/**
 * @param {(caption: string, counted: PromptTokens|null) => void} report
 * @returns {(caption: string) => void} counts once typing pauses; a later caption overtakes an earlier one
 */
function tokenCounter(report) {
  let timer = 0;
  let running = new AbortController();
  return (caption) => {
    clearTimeout(timer);
    running.abort();
    running = new AbortController();
    const { signal } = running;
    if (!caption) {
      report(caption, null);
      return;
    }
    timer = setTimeout(async () => {
      try {
        report(caption, await countTokens(caption, signal));
      } catch (error) {
        // The count is optional: that the server is away is shown elsewhere.
        if (!signal.aborted) report(caption, null);
        else if (error !== signal.reason) console.warn(error);
      }
    }, PAUSE_MS);
  };
}
