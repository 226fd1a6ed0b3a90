/**
 * The board: a card for every generation, from the request to the ranked images, newest first.
 */

import { announce, button, byId, element, imageElement, removeImages } from "./elements.js";
import { readingOf } from "./model.js";
import { linkButton } from "./shared.js";
import { formatTime, formatWait, onLanguage, t } from "./texts.js";
import { tilesOf } from "./tiles.js";
import { unreadWords } from "./verdict.js";

/**
 * @typedef {import("./queue.js").Job} Job
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./api.js").ImageRequest} ImageRequest
 *
 * What a card's buttons do.
 * @typedef {object} Actions
 * @property {(job: Job) => void} cancel
 * @property {(job: Job) => void} retry
 * @property {(request: ImageRequest) => void} useSeed
 * @property {(request: ImageRequest) => void} useSettings
 * @property {(request: ImageRequest) => void} another the same with a new seed
 * @property {(generation: Generation, index: number) => void} open
 * @property {(generation: Generation, index: number, isFavourite: boolean) => void} favour
 * @property {(generation: Generation, index: number) => void} download
 * @property {(id: string) => void} dismiss from the board; the gallery keeps it
 *
 * @typedef {object} Board
 * @property {import("./queue.js").OnChange} show
 * @property {(generation: Generation) => void} showGeneration
 * @property {(id: string, text: string) => void} warn
 * @property {(id: string) => void} remove
 * @property {(generation: Generation) => void} update
 * @property {() => void} clear
 *
 * @typedef {object} Entry
 * @property {HTMLElement} card
 * @property {Job|null} job
 * @property {Generation|null} generation set once it is done
 * @property {boolean} isOpen whether all candidates are shown
 * @property {string} announced
 * @property {string} warning
 */

/**
 * @param {Actions} actions
 * @returns {Board}
 */
export function startBoard(actions) {
  /** @type {Map<string, Entry>} */
  const entries = new Map();

  /** @param {string} id */
  const entryOf = (id) => {
    let entry = entries.get(id);
    if (!entry) {
      const card = element("article", { class: "card", "data-id": id });
      entry = { card, job: null, generation: null, isOpen: false, announced: "", warning: "" };
      entries.set(id, entry);
      place(card, id);
    }
    return entry;
  };
  /** @param {Entry} entry */
  const render = (entry) => {
    const { card, job, generation } = entry;
    const focused = card.contains(document.activeElement) ? document.activeElement?.getAttribute("data-action") : null;
    removeImages(card);
    if (generation) renderDone(entry, generation, actions, () => render(entry));
    else if (job) renderRunning(entry, job, actions);
    // A card that is made anew keeps the keyboard where it was.
    if (focused) /** @type {HTMLElement|null} */ (card.querySelector(`[data-action="${focused}"]`))?.focus();
  };
  const showEmpty = () => byId("empty").toggleAttribute("hidden", byId("generations").childElementCount > 0);
  /**
   * @param {string} id
   * @param {Entry} entry
   */
  const remove = (id, entry) => {
    removeImages(entry.card);
    entry.card.remove();
    entries.delete(id);
  };
  onLanguage(() => entries.forEach(render));

  return {
    show: (job, what) => {
      const entry = entryOf(job.id);
      entry.job = job;
      if (what === "state") {
        render(entry);
        announceState(entry, job);
      } else if (what === "wait") showWait(entry.card, job);
      else if (what === "progress") showProgress(entry.card, job);
      else showPreviews(entry.card, job);
      showEmpty();
    },
    showGeneration: (generation) => {
      const entry = entryOf(generation.id);
      entry.generation = generation;
      render(entry);
      showEmpty();
    },
    update: (generation) => {
      const entry = entries.get(generation.id);
      if (!entry?.generation) return;
      entry.generation = generation;
      render(entry);
    },
    warn: (id, text) => {
      const entry = entryOf(id);
      entry.warning = text;
      render(entry);
    },
    remove: (id) => {
      const entry = entries.get(id);
      if (entry) remove(id, entry);
      showEmpty();
    },
    clear: () => {
      for (const [id, entry] of entries) if (entry.generation) remove(id, entry);
      showEmpty();
    },
  };
}

/**
 * Newest first, in whatever order cards are made.
 * @param {HTMLElement} card
 * @param {string} id
 */
export function place(card, id) {
  const board = byId("generations");
  const older = [...board.children].find((other) => (other.getAttribute("data-id") ?? "") < id);
  board.insertBefore(card, older ?? null);
}

/**
 * Has a change of state read out, each once.
 * @param {Entry} entry
 * @param {Job} job
 */
function announceState(entry, job) {
  /** @type {Partial<Record<import("./queue.js").State, () => string>>} */
  const texts = {
    queued: () => t("announce.queued", { position: job.position }),
    generating: () => t("announce.generating"),
    busy: () => t("announce.busy"),
    done: () => t("announce.done", { n: job.images.filter((each) => each.isShown).length }),
    failed: () => t("announce.failed", { why: whyFailed(job) }),
    cancelled: () => t("announce.cancelled"),
  };
  const text = texts[job.state]?.();
  if (text && text !== entry.announced) announce(text);
  entry.announced = text ?? entry.announced;
}

/** @param {Job} job */
export function whyFailed(job) {
  return job.error ? job.error.text : t("error.connection");
}

/**
 * @param {ImageRequest} request
 * @param {number} createdMs
 * @param {HTMLElement|null} state
 * @param {...HTMLElement} buttons
 */
function headOf(request, createdMs, state, ...buttons) {
  return element(
    "header",
    { class: "card-head" },
    element("h3", { text: request.caption || t("card.no_caption") }),
    readingOf(request.caption),
    element(
      "p",
      { class: "facts hint" },
      element("span", { text: formatTime(createdMs) }),
      request.kind === "new" ? null : element("span", { text: t(`kind.${request.kind}`) }),
      element("span", { class: "numbers", text: t("card.seed", { seed: request.seed }) }),
      element("span", { text: t("card.candidates", { n: request.candidates }) }),
    ),
    element("div", { class: "card-state" }, state, ...buttons),
  );
}

// ------------------------------------------------------------------------------------------------------ while it runs

/**
 * @param {Entry} entry
 * @param {Job} job
 * @param {Actions} actions
 */
function renderRunning(entry, job, actions) {
  const isOver = ["failed", "cancelled", "done", "interrupted"].includes(job.state);
  const state = element("span", { class: `state ${job.state}`, text: stateText(job) });
  const { request } = job;
  const cancel = button({ icon: "close", text: t("card.cancel"), press: () => actions.cancel(job), action: "cancel" });
  const again = t(job.state === "interrupted" ? "card.same_seed" : "card.retry");
  const retry = button({ icon: "again", text: again, press: () => actions.retry(job), action: "retry" });
  const settings = button({
    text: t("card.use_settings"),
    press: () => actions.useSettings(request),
    action: "settings",
  });
  const dismiss = dismissButton(job.id, actions);
  const buttons = job.state === "done" ? [] : isOver ? [retry, settings, dismiss] : [cancel];
  entry.card.className = `card running ${job.state}`;
  entry.card.append(headOf(request, job.createdMs, state, ...buttons));
  if (job.state === "failed") entry.card.append(element("p", { class: "fault", text: whyFailed(job) }));
  if (isOver || job.state === "waiting") return;
  const bar = element("progress", { max: 1, "aria-label": t("card.progress") });
  const tiles = Array.from({ length: request.n }, (_, index) =>
    element("div", { class: "tile blank", "data-candidate": index }, element("div", { class: "image" })),
  );
  entry.card.append(bar, element("div", { class: "tiles", "data-n": request.n }, ...tiles));
  showProgress(entry.card, job);
  showPreviews(entry.card, job);
}

/**
 * @param {string} id
 * @param {Actions} actions
 */
function dismissButton(id, actions) {
  return button({ icon: "close", label: t("card.dismiss"), press: () => actions.dismiss(id), action: "dismiss" });
}

/**
 * @param {Job} job
 * @returns {string}
 */
export function stateText(job) {
  const wait = job.waitS === null ? null : formatWait(job.waitS);
  if (job.state === "queued")
    return wait
      ? t("state.queued_wait", { position: job.position, wait })
      : t("state.queued", { position: job.position });
  if (job.state === "busy" && wait) return t(job.isLimited ? "state.limited_wait" : "state.busy_wait", { wait });
  return t(`state.${job.state}`);
}

/**
 * @param {HTMLElement} card
 * @param {Job} job
 */
function showWait(card, job) {
  const state = card.querySelector(".state");
  if (state) state.textContent = stateText(job);
}

/**
 * @param {HTMLElement} card
 * @param {Job} job
 */
function showProgress(card, job) {
  const bar = card.querySelector("progress");
  if (!bar) return;
  // Before the first report it stays without a value, and shows that something goes on without saying how much.
  if (job.state === "generating" && job.tokensTotal) bar.value = job.tokensGenerated / job.tokensTotal;
  else if (job.state !== "generating") bar.value = 0;
}

/**
 * A preview replaces the one before it only once it can be painted: no flicker between rows.
 * @param {HTMLElement} card
 * @param {Job} job
 */
function showPreviews(card, job) {
  for (const [candidate, preview] of job.previews) {
    const tile = /** @type {HTMLElement|null} */ (card.querySelector(`[data-candidate="${candidate}"]`));
    const frame = tile?.querySelector(".image");
    const rows = String(preview.rowsGenerated);
    if (!tile || !frame || tile.getAttribute("data-rows") === rows) continue;
    tile.setAttribute("data-rows", rows);
    tile.style.setProperty("--generated", String(preview.rowsGenerated / preview.rowsTotal));
    const image = imageElement(preview.blob, t("card.preview", { n: candidate + 1 }));
    image.decode().then(
      () => {
        if (tile.getAttribute("data-rows") !== rows) return URL.revokeObjectURL(image.src);
        removeImages(frame);
        frame.append(image);
        tile.classList.remove("blank");
      },
      () => URL.revokeObjectURL(image.src), // the card went away meanwhile
    );
  }
}

// ----------------------------------------------------------------------------------------------------- when it is done

/**
 * @param {Entry} entry
 * @param {Generation} generation
 * @param {Actions} actions
 * @param {() => void} render
 */
function renderDone(entry, generation, actions, render) {
  const { card, warning, isOpen } = entry;
  const shown = generation.images.filter((each) => each.isShown);
  const others = generation.images.filter((each) => !each.isShown);
  const took = generation.totalS === null ? "" : t("card.took", { s: Number(generation.totalS.toFixed(1)) });
  const state = took ? element("span", { class: "state done", text: took }) : null;
  card.className = "card done";
  card.append(headOf(generation.request, generation.createdMs, state, dismissButton(generation.id, actions)));
  const unread = unreadWords(generation);
  if (unread) card.append(element("p", { class: "warning", text: unread }));
  if (generation.tokensCut)
    card.append(element("p", { class: "warning", text: t("card.tokens_cut", { n: generation.tokensCut }) }));
  if (warning) card.append(element("p", { class: "warning", text: warning }));
  card.append(tilesOf(generation, shown, actions));
  const more = element("div", { class: "candidates", id: `candidates-${generation.id}`, hidden: !isOpen });
  if (isOpen) more.append(element("h4", { text: t("card.other_candidates") }), tilesOf(generation, others, actions));
  card.append(cardActions(entry, generation, others.length, actions, render), more);
}

/**
 * @param {Entry} entry
 * @param {Generation} generation
 * @param {number} numOthers
 * @param {Actions} actions
 * @param {() => void} render
 */
function cardActions(entry, generation, numOthers, actions, render) {
  const { id, images, request } = generation;
  const toggle = button({
    icon: "layers",
    text: entry.isOpen ? t("card.hide_candidates") : t("card.all_candidates", { n: images.length }),
    action: "candidates",
    press: () => {
      entry.isOpen = !entry.isOpen;
      render();
    },
  });
  toggle.setAttribute("aria-expanded", String(entry.isOpen));
  toggle.setAttribute("aria-controls", `candidates-${id}`);
  return element(
    "div",
    { class: "card-actions" },
    button({ icon: "again", text: t("card.another"), press: () => actions.another(request), action: "another" }),
    button({ text: t("card.use_seed"), press: () => actions.useSeed(request), action: "seed" }),
    button({ text: t("card.use_settings"), press: () => actions.useSettings(request), action: "settings" }),
    linkButton(request),
    numOthers ? toggle : null,
  );
}
