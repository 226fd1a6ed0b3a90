/**
 * All texts of the page, in Korean or in English. It starts in Korean.
 *
 * Fixed texts are in the document: `data-text` names the text of an element, `data-label` its accessible name,
 * `data-hint` its placeholder. What is made later calls `t`, and again in `onLanguage`.
 */

import { english } from "./texts_en.js";
import { korean } from "./texts_ko.js";

const TABLES = { ko: korean, en: english };
/** @type {(() => void)[]} */
const listeners = [];
/** @type {"ko"|"en"} */
let chosen = document.documentElement.lang === "en" ? "en" : "ko";

/** @returns {"ko"|"en"} */
export function language() {
  return chosen;
}

/**
 * @param {string} key
 * @param {Record<string, string|number>} [values] for the {names} in the text; numbers are formatted for the language
 * @returns {string}
 * @throws {Error} for a key without a text: a bug of the page
 */
export function t(key, values = {}) {
  const text = TABLES[chosen][key];
  if (text === undefined) throw new Error(`no text for ${key}`);
  return text.replace(/\{(\w+)(?:\|([^|}]*)\|([^}]*))?\}/gu, (_, name, one, many) => {
    const value = values[name];
    const shown = typeof value === "number" ? formatNumber(value) : String(value);
    return one === undefined ? shown : `${shown} ${value === 1 ? one : many}`;
  });
}

/**
 * @param {"ko"|"en"} to
 */
export function setLanguage(to) {
  chosen = to;
  document.documentElement.lang = to;
  fill();
  for (const listener of listeners) listener();
}

/**
 * @param {() => void} listener called now and whenever the language changes
 */
export function onLanguage(listener) {
  listeners.push(listener);
  listener();
}

/** Puts the chosen language into the fixed parts of the document. */
export function fill() {
  document.title = t("title");
  /**
   * @param {string} attribute
   * @param {(part: Element, text: string) => void} put
   */
  const each = (attribute, put) => {
    for (const part of document.querySelectorAll(`[${attribute}]`)) put(part, t(part.getAttribute(attribute) ?? ""));
  };
  each("data-text", (part, text) => (part.textContent = text));
  each("data-label", (part, text) => part.setAttribute("aria-label", text));
  each("data-hint", (part, text) => part.setAttribute("placeholder", text));
}

/**
 * @param {number} value
 * @param {number} [digits] after the point, at most
 * @returns {string}
 */
export function formatNumber(value, digits = 3) {
  return new Intl.NumberFormat(chosen, { maximumFractionDigits: digits }).format(value);
}

/**
 * @param {number} value a score
 * @returns {string} always three digits after the point, so that columns of scores line up
 */
export function formatScore(value) {
  return new Intl.NumberFormat(chosen, { minimumFractionDigits: 3, maximumFractionDigits: 3 }).format(value);
}

/**
 * @param {number} milliseconds since 1970
 * @returns {string} date and time, short
 */
export function formatTime(milliseconds) {
  const isToday = new Date(milliseconds).toDateString() === new Date().toDateString();
  return new Intl.DateTimeFormat(
    chosen,
    isToday ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" },
  ).format(milliseconds);
}

/**
 * @param {number} milliseconds since 1970
 * @returns {string} the time of day
 */
export function formatClock(milliseconds) {
  return new Intl.DateTimeFormat(chosen, { timeStyle: "short" }).format(milliseconds);
}

/**
 * @param {number} milliseconds since 1970
 * @returns {string} the day, as a heading: "오늘", "어제", "2026년 11월 29일 일요일"
 */
export function formatDay(milliseconds) {
  const day = new Date(milliseconds).toDateString();
  const yesterday = new Date();
  yesterday.setDate(yesterday.getDate() - 1);
  if (day === new Date().toDateString()) return t("day.today");
  if (day === yesterday.toDateString()) return t("day.yesterday");
  return new Intl.DateTimeFormat(chosen, { dateStyle: "full" }).format(milliseconds);
}

/**
 * @param {number} seconds
 * @returns {string} "12초", "2분 5초"
 */
export function formatWait(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  return whole < 60 ? t("seconds", { s: whole }) : t("minutes", { m: Math.floor(whole / 60), s: whole % 60 });
}
