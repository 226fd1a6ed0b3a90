/**
 * Heights of the bars that stay in view, for the style sheets: what has the keyboard must never lie beneath one.
 *
 * They follow the language, the zoom and the notice of a lost connection, so they are measured.
 */

const BARS = { "--bars": ".bars", "--submit": ".submit", "--selection": ".selection" };

/** Measures now, and whenever a bar or the window changes. */
export function startLayout() {
  const sizes = new ResizeObserver(measure);
  for (const selector of Object.values(BARS)) {
    const bar = document.querySelector(selector);
    if (bar) sizes.observe(bar);
  }
  // Whether a bar stays in view depends on the window's height.
  window.addEventListener("resize", measure);
  measure();
}

function measure() {
  for (const [name, selector] of Object.entries(BARS)) {
    const bar = /** @type {HTMLElement|null} */ (document.querySelector(selector));
    const stays = bar && getComputedStyle(bar).position === "sticky";
    document.documentElement.style.setProperty(name, `${stays ? bar.offsetHeight : 0}px`);
  }
}
