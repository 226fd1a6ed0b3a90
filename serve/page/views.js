/**
 * Two views in one page, by the address: #studio and #gallery. So back, forward and bookmarks work.
 */

import { byId } from "./elements.js";

const VIEWS = { studio: "compose-title", gallery: "gallery-title" };

/** @type {(() => void)[]} */
const listeners = [];

/**
 * @param {() => void} listener called whenever the view changes
 */
export function onView(listener) {
  listeners.push(listener);
}

/** Shows the view that the address names, now and when it changes. */
export function startViews() {
  show();
  window.addEventListener("hashchange", () => {
    const view = show();
    // A screen reader reads on from the view's title, and the next Tab goes on from there.
    const title = byId(VIEWS[view]);
    title.tabIndex = -1;
    title.focus({ preventScroll: true });
    window.scrollTo({ top: 0 });
    for (const listener of listeners) listener();
  });
}

/**
 * @param {"studio"|"gallery"} view
 */
export function goTo(view) {
  if (named() !== view) window.location.hash = view;
}

/** @returns {"studio"|"gallery"} */
function named() {
  return window.location.hash === "#gallery" ? "gallery" : "studio";
}

/** @returns {"studio"|"gallery"} */
function show() {
  const view = named();
  for (const each of Object.keys(VIEWS)) {
    byId(each).hidden = each !== view;
    const link = byId(`to-${each}`);
    if (each === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  return view;
}
