/**
 * Two rooms in one page, by the address: #studio draws, #gallery keeps. So that back, forward and bookmarks work.
 */

import { byId } from "./elements.js";

const ROOMS = { studio: "compose-title", gallery: "gallery-title" };

/** @type {(() => void)[]} */
const listeners = [];

/**
 * @param {() => void} listener called whenever another room is shown
 */
export function onRoom(listener) {
  listeners.push(listener);
}

/** Shows the room that the address names, now and when it changes. */
export function startRooms() {
  show();
  window.addEventListener("hashchange", () => {
    const room = show();
    // A screen reader reads on from the room's title, and the next Tab goes on from there.
    const title = byId(ROOMS[room]);
    title.tabIndex = -1;
    title.focus({ preventScroll: true });
    window.scrollTo({ top: 0 });
    for (const listener of listeners) listener();
  });
}

/**
 * @param {"studio"|"gallery"} room
 */
export function goTo(room) {
  if (named() !== room) window.location.hash = room;
}

/** @returns {"studio"|"gallery"} */
function named() {
  return window.location.hash === "#gallery" ? "gallery" : "studio";
}

function show() {
  const room = named();
  for (const each of Object.keys(ROOMS)) {
    byId(each).hidden = each !== room;
    const link = byId(`to-${each}`);
    if (each === room) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  return room;
}
