/**
 * Whether the server answers. When it does not, the page says so and polls /readyz, less and less often, until it does.
 */

import { isReady } from "./api.js";
import { announce, byId } from "./elements.js";
import { onLanguage, t } from "./texts.js";

const WAITS_S = [0.5, 1, 2, 4, 5];

/** @type {Promise<void>|null} */
let waiting = null;

/**
 * @returns {Promise<void>} when the server is ready; shows a notice meanwhile
 */
export function whenReady() {
  waiting ??= watch().finally(() => {
    waiting = null;
    show();
  });
  return waiting;
}

/** Keeps the notice in the language shown. */
export function startConnection() {
  onLanguage(show);
}

async function watch() {
  let shown = false;
  for (let tries = 0; !(await isReady()); tries++) {
    if (!shown) {
      shown = true;
      // After `waiting` is set.
      queueMicrotask(show);
    }
    await new Promise((resolve) => setTimeout(resolve, WAITS_S[Math.min(tries, WAITS_S.length - 1)] * 1000));
  }
  if (shown) announce(t("connection.back"));
}

function show() {
  const notice = byId("notice");
  notice.hidden = waiting === null;
  notice.textContent = waiting === null ? "" : t("connection.lost");
}
