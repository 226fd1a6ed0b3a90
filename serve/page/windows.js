/**
 * Several windows of the page on one gallery: what one stores, changes or deletes, the others show.
 */

/**
 * @typedef {{what: "stored"|"changed"|"removed"|"cleared"|"collections", id: string}} News
 */

/**
 * @param {(news: News) => void} listener called with what other windows did
 * @returns {(what: News["what"], id?: string) => void} reports what this one did
 */
export function startWindows(listener) {
  if (typeof BroadcastChannel === "undefined") return () => {};
  const channel = new BroadcastChannel("kodalle");
  channel.addEventListener("message", (event) => listener(event.data));
  return (what, id = "") => channel.postMessage({ what, id });
}
