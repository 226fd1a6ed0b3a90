/**
 * The caption box: how long the caption is in characters and in the model's tokens, before it is sent.
 *
 * Characters beyond the limit are reported, never cut: a cut would hide what was pasted, and break a syllable that is
 * still being composed. Tokens are counted by the server, with the model's own tokenizer.
 */

import { countTokens } from "./api.js";
import { byId } from "./elements.js";
import { forget, keep, kept, lasting } from "./preferences.js";
import { onLanguage, t } from "./texts.js";

/** As in KoDALLE's published demo. */
export const MOST_CHARACTERS = 200;
const PAUSE_MS = 250;
const DRAFT = "kodalle.caption";

/**
 * @typedef {{tokens: number, limit: number}} TokenCount
 *
 * @typedef {object} CaptionBox
 * @property {() => string} read the caption as it is sent: one line, NFC
 * @property {(caption: string) => void} write
 * @property {() => string|null} fault why no image can be generated from it; null when one can
 * @property {() => void} showFault
 * @property {(listener: (caption: string) => void) => void} onChange
 */

/** @returns {CaptionBox} */
export function startCaption() {
  const box = /** @type {HTMLTextAreaElement} */ (byId("caption"));
  /** @type {((caption: string) => void)[]} */
  const listeners = [];
  const state = { tokens: /** @type {TokenCount|null} */ (null), isFaultShown: false };
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
    showTokens(state.tokens);
    const isShown = isOver || (state.isFaultShown && length === 0);
    const place = byId("caption-fault");
    place.hidden = !isShown;
    place.textContent = isShown ? fault() : "";
    box.setAttribute("aria-invalid", String(isShown));
  };
  const count = tokenCounter((tokens) => {
    state.tokens = tokens;
    show();
  });
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
    write: (caption) => {
      box.value = caption;
      changed();
    },
    fault,
    showFault: () => {
      state.isFaultShown = true;
      show();
      box.focus({ preventScroll: true });
      box.scrollIntoView({ block: "nearest" });
    },
    onChange: (listener) => void listeners.push(listener),
  };
}

/**
 * @param {TokenCount|null} counted null: not known, or an empty caption
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
 * @param {(counted: TokenCount|null) => void} report
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
      report(null);
      return;
    }
    timer = setTimeout(async () => {
      try {
        report(await countTokens(caption, signal));
      } catch (error) {
        // The count is optional: that the server is away is shown elsewhere.
        if (!signal.aborted) report(null);
        else if (error !== signal.reason) console.warn(error);
      }
    }, PAUSE_MS);
  };
}
