/**
 * Making elements. Everything shown passes through here as text: captions, file names and errors come from people and
 * other machines, so nothing is ever parsed as HTML.
 */

const ICONS = {
  star: "m12 3 2.7 5.8 6.3.8-4.6 4.3 1.2 6.3L12 17.1l-5.6 3.1 1.2-6.3L3 9.6l6.3-.8z",
  download: "M12 4v11m0 0-4.5-4.5M12 15l4.5-4.5M5 20h14",
  brush: "M20 4 10.5 13.5M8.5 13a3.5 3.5 0 0 0-3.5 3.5c0 1.5-.8 2.7-2 3.5 3.8.6 8-.3 8-4a3 3 0 0 0-2.5-3z",
  layers: "M4 5h16v5H4zM4 14h16M4 18.5h16",
  compare: "M4 5h7v14H4zM13 5h7v14h-7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  link: "M10 14a4 4 0 0 0 5.7 0l3.1-3.1a4 4 0 0 0-5.7-5.7L12 6.3M14 10a4 4 0 0 0-5.7 0l-3.1 3.1a4 4 0 0 0 5.7 5.7l1.1-1.1",
  close: "M6 6l12 12M18 6 6 18",
  bin: "M5 7h14M10 7V4h4v3m-7 0 .8 13h8.4L17 7",
  again: "M19 8a8 8 0 1 0 1 6M20 4v5h-5",
  left: "m14.5 5-7 7 7 7",
  right: "m9.5 5 7 7-7 7",
  undo: "M8 5 4 9l4 4M4 9h10a5.5 5.5 0 0 1 0 11h-3",
  redo: "m16 5 4 4-4 4m4-4H10a5.5 5.5 0 0 0 0 11h3",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2m0 16v2M2 12h2m16 0h2M5 5l1.4 1.4m11.2 11.2L19 19M5 19l1.4-1.4M17.6 6.4 19 5",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  contrast: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zm0 0v18m3-16.5v15M18 6v12",
};

/**
 * @param {string} id
 * @returns {HTMLElement} the element of that id
 * @throws {Error} when the page has none: a fault of the page, not of its user
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, unknown>} [attributes] `class`, `text`, `on` ({event: listener}), `style` ({property: value}),
 *   any attribute; true sets it empty, false, null and undefined leave it out
 * @param {...(Node|string|null|undefined|false)} children strings become text
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "text") made.textContent = String(value);
    else if (name === "on")
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name === "style") for (const [property, to] of Object.entries(value)) made.style.setProperty(property, to);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child !== null && child !== undefined && child !== false) made.append(child);
  return made;
}

/**
 * @param {keyof typeof ICONS} name
 * @returns {SVGElement} without an accessible name: the button around it has one
 */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `icon icon-${name}`);
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/**
 * A button with an icon, a text, or both.
 * @param {{icon?: keyof typeof ICONS, text?: string, label?: string, class?: string, press: (event: Event) => void,
 *   pressed?: boolean, disabled?: boolean, action?: string}} options `label`: its accessible name where it has no text
 * @returns {HTMLButtonElement}
 */
export function button(options) {
  const made = element("button", {
    type: "button",
    class: options.class ?? "quiet",
    "aria-label": options.text ? null : options.label,
    title: options.text ? null : options.label,
    "aria-pressed": options.pressed === undefined ? null : String(options.pressed),
    "data-action": options.action,
    disabled: options.disabled,
    on: { click: options.press },
  });
  if (options.icon) made.append(icon(options.icon));
  if (options.text) made.append(element("span", { text: options.text }));
  return made;
}

/**
 * An `<img>` of bytes. Its URL holds them in memory until `removeImages`.
 * @param {Blob} blob
 * @param {string} alt
 * @returns {HTMLImageElement}
 */
export function imageElement(blob, alt) {
  const made = element("img", { alt, decoding: "async", draggable: "false" });
  made.addEventListener("load", () => made.classList.toggle("crisp", isSmall(made.naturalWidth)));
  made.src = URL.createObjectURL(blob);
  return made;
}

/**
 * @param {number} pixels side of an image
 * @returns {boolean} whether it is shown with hard pixel edges: smoothed, it would only be a blur
 */
export function isSmall(pixels) {
  return pixels > 0 && pixels <= 64;
}

/**
 * Empties an element and frees its images' memory.
 * @param {Element} root
 */
export function removeImages(root) {
  for (const image of root.querySelectorAll("img[src^='blob:']"))
    URL.revokeObjectURL(/** @type {HTMLImageElement} */ (image).src);
  root.replaceChildren();
}

/**
 * Has screen readers read a text, after what they are reading now.
 * @param {string} text
 */
export function announce(text) {
  // Behind an open dialog nothing is read out, so each dialog has a place of its own.
  const root = [...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body;
  const place = root.querySelector(":scope > .announcer");
  if (place) place.textContent = text;
}

let toastTimer = 0;

/**
 * Shows a text for a few seconds, and has it read out.
 * @param {string} text
 */
export function showBriefly(text) {
  announce(text);
  const toast = byId("toast");
  toast.textContent = text;
  toast.showPopover();
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => toast.hidePopover(), 3500);
}

/**
 * @param {string} id of a dialog
 * @param {Node} content shown in place of what it held
 * @returns {HTMLDialogElement}
 */
export function fillDialog(id, content) {
  const dialog = /** @type {HTMLDialogElement} */ (byId(id));
  const place = /** @type {HTMLElement} */ (dialog.querySelector(".dialog-content"));
  removeImages(place);
  place.append(content);
  return dialog;
}
