/**
 * What the board shows: a card for every drawing, from asking to the ranked pictures, newest first.
 */

import { announce, button, byId, element, picture, removePictures } from "./elements.js";
import { formatScore, formatTime, formatWait, onLanguage, t } from "./texts.js";

/** @typedef {import("./queue.js").Job} Job */
/** @typedef {import("./store.js").Drawing} Drawing */

/**
 * What a card's buttons do.
 * @typedef {object} Actions
 * @property {(job: Job) => void} cancel
 * @property {(job: Job) => void} tryAgain
 * @property {(request: import("./api.js").ImageRequest) => void} useSeed
 * @property {(request: import("./api.js").ImageRequest) => void} useSettings
 * @property {(request: import("./api.js").ImageRequest) => void} another the same with a new seed
 * @property {(drawing: Drawing, index: number) => void} open
 * @property {(drawing: Drawing, index: number, isFavourite: boolean) => void} favour
 * @property {(drawing: Drawing, index: number) => void} download
 * @property {(id: string) => void} takeAway from the board; the gallery keeps it
 */

/**
 * @param {Actions} actions
 * @returns {{show: (job: Job, what: "state"|"progress"|"preview") => void, showDrawing: (drawing: Drawing) => void,
 *   warn: (id: string, text: string) => void, remove: (id: string) => void, update: (drawing: Drawing) => void, clear: () => void}}
 */
export function startBoard(actions) {
  /** @type {Map<string, {card: HTMLElement, job: Job|null, drawing: Drawing|null, isOpen: boolean, told: string,
   *   warning: string}>} */
  const entries = new Map();

  const entryOf = (id) => {
    let entry = entries.get(id);
    if (!entry) {
      entry = {
        card: element("article", { class: "card", "data-id": id }),
        job: null,
        drawing: null,
        isOpen: false,
        told: "",
        warning: "",
      };
      entries.set(id, entry);
      place(entry.card, id);
    }
    return entry;
  };
  const draw = (entry) => {
    const focused = entry.card.contains(document.activeElement)
      ? document.activeElement.getAttribute("data-action")
      : null;
    removePictures(entry.card);
    if (entry.drawing) drawFinished(entry, entry.drawing, actions, () => draw(entry));
    else drawRunning(entry, entry.job, actions);
    // A card that is made anew keeps the keyboard where it was.
    if (focused) /** @type {HTMLElement|null} */ (entry.card.querySelector(`[data-action="${focused}"]`))?.focus();
  };
  const showEmpty = () => byId("empty").toggleAttribute("hidden", entries.size > 0);
  onLanguage(() => entries.forEach(draw));

  return {
    show: (job, what) => {
      const entry = entryOf(job.id);
      entry.job = job;
      if (what === "state") {
        draw(entry);
        tell(entry, job);
      } else if (what === "progress") showProgress(entry.card, job);
      else showPreviews(entry.card, job);
      showEmpty();
    },
    showDrawing: (drawing) => {
      const entry = entryOf(drawing.id);
      entry.drawing = drawing;
      draw(entry);
      showEmpty();
    },
    update: (drawing) => {
      const entry = entries.get(drawing.id);
      if (!entry?.drawing) return;
      entry.drawing = drawing;
      draw(entry);
    },
    warn: (id, text) => {
      const entry = entryOf(id);
      entry.warning = text;
      draw(entry);
    },
    remove: (id) => {
      const entry = entries.get(id);
      if (!entry) return;
      removePictures(entry.card);
      entry.card.remove();
      entries.delete(id);
      showEmpty();
    },
    clear: () => {
      for (const [id, entry] of entries) {
        if (!entry.drawing) continue;
        removePictures(entry.card);
        entry.card.remove();
        entries.delete(id);
      }
      showEmpty();
    },
  };
}

/** Newest first, wherever it comes from. */
function place(card, id) {
  const board = byId("drawings");
  const older = [...board.children].find((other) => other.getAttribute("data-id") < id);
  board.insertBefore(card, older ?? null);
}

/** Says what has changed, once for each thing worth knowing. */
function tell(entry, job) {
  const text = {
    queued: () => t("told.queued", { position: job.position }),
    drawing: () => t("told.drawing"),
    busy: () => t("told.busy"),
    done: () => t("told.done", { n: job.pictures.filter((each) => each.isShown).length }),
    failed: () => t("told.failed", { why: whyFailed(job) }),
    cancelled: () => t("told.cancelled"),
  }[job.state]?.();
  if (text && text !== entry.told) announce(text);
  entry.told = text ?? entry.told;
}

function whyFailed(job) {
  return job.error ? job.error.told : t("error.connection");
}

function headOf(request, createdMs, state, ...buttons) {
  return element(
    "header",
    { class: "card-head" },
    element("h3", { text: request.caption || t("card.no_caption") }),
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

// ------------------------------------------------------------------------------------------------- while it is drawn

function drawRunning(entry, job, actions) {
  const isOver = ["failed", "cancelled", "done"].includes(job.state);
  const state = element("span", { class: `state ${job.state}`, text: stateText(job) });
  const cancel = button({ icon: "close", text: t("card.cancel"), press: () => actions.cancel(job), data: "cancel" });
  const retry = button({ icon: "again", text: t("card.try_again"), press: () => actions.tryAgain(job), data: "again" });
  const settings = button({
    text: t("card.use_settings"),
    press: () => actions.useSettings(job.request),
    data: "settings",
  });
  const away = button({
    icon: "close",
    label: t("card.take_away"),
    press: () => actions.takeAway(job.id),
    data: "away",
  });
  entry.card.className = `card running ${job.state}`;
  entry.card.append(
    headOf(
      job.request,
      job.createdMs,
      state,
      ...(job.state === "done" ? [] : isOver ? [retry, settings, away] : [cancel]),
    ),
  );
  if (job.state === "failed") entry.card.append(element("p", { class: "fault", text: whyFailed(job) }));
  if (isOver || job.state === "waiting") return;
  const bar = element("progress", { max: 1, "aria-label": t("card.progress") });
  const tiles = Array.from({ length: job.request.n }, (_, index) =>
    element("div", { class: "tile blank", "data-candidate": index }, element("div", { class: "picture" })),
  );
  entry.card.append(bar, element("div", { class: "tiles", "data-n": job.request.n }, ...tiles));
  showProgress(entry.card, job);
  showPreviews(entry.card, job);
}

function stateText(job) {
  const wait = job.waitS === null ? null : formatWait(job.waitS);
  if (job.state === "queued")
    return wait
      ? t("state.queued_wait", { position: job.position, wait })
      : t("state.queued", { position: job.position });
  if (job.state === "busy") return wait ? t("state.busy_wait", { wait }) : t("state.busy");
  return t(`state.${job.state}`);
}

function showProgress(card, job) {
  const bar = /** @type {HTMLProgressElement|null} */ (card.querySelector("progress"));
  if (!bar) return;
  // Without a value it shows that something goes on, without saying how much.
  if (job.state === "drawing" && job.tokensTotal) bar.value = job.tokensGenerated / job.tokensTotal;
  else if (job.state !== "drawing") bar.value = 0;
}

/** A preview replaces the one before it only once it can be painted: no flicker between rows. */
function showPreviews(card, job) {
  for (const [candidate, preview] of job.previews) {
    const tile = card.querySelector(`[data-candidate="${candidate}"]`);
    if (!tile || tile.getAttribute("data-rows") === String(preview.rowsGenerated)) continue;
    tile.setAttribute("data-rows", String(preview.rowsGenerated));
    /** @type {HTMLElement} */ (tile).style.setProperty("--drawn", String(preview.rowsGenerated / preview.rowsTotal));
    const image = picture(preview.blob, t("card.preview", { n: candidate + 1 }));
    image.decode().then(
      () => {
        const frame = tile.querySelector(".picture");
        if (tile.getAttribute("data-rows") !== String(preview.rowsGenerated)) return URL.revokeObjectURL(image.src);
        removePictures(frame);
        frame.append(image);
        tile.classList.remove("blank");
      },
      () => URL.revokeObjectURL(image.src), // the card went away meanwhile
    );
  }
}

// ------------------------------------------------------------------------------------------------------ when it is done

function drawFinished(entry, drawing, actions, redraw) {
  const shown = drawing.pictures.filter((each) => each.isShown);
  const others = drawing.pictures.filter((each) => !each.isShown);
  const took = drawing.totalS === null ? "" : t("card.took", { s: Number(drawing.totalS.toFixed(1)) });
  entry.card.className = "card done";
  entry.card.append(
    headOf(
      drawing.request,
      drawing.createdMs,
      took ? element("span", { class: "state done", text: took }) : null,
      button({ icon: "close", label: t("card.take_away"), press: () => actions.takeAway(drawing.id), data: "away" }),
    ),
  );
  if (drawing.tokensCut)
    entry.card.append(element("p", { class: "warning", text: t("card.tokens_cut", { n: drawing.tokensCut }) }));
  if (entry.warning) entry.card.append(element("p", { class: "warning", text: entry.warning }));
  entry.card.append(tilesOf(drawing, shown, actions));
  const more = element("div", { class: "candidates", id: `candidates-${drawing.id}`, hidden: !entry.isOpen });
  if (entry.isOpen) more.append(element("h4", { text: t("card.other_candidates") }), tilesOf(drawing, others, actions));
  entry.card.append(cardActions(entry, drawing, others.length, actions, redraw), more);
}

function cardActions(entry, drawing, numOthers, actions, redraw) {
  const toggle = button({
    icon: "layers",
    text: entry.isOpen ? t("card.hide_candidates") : t("card.all_candidates", { n: drawing.pictures.length }),
    data: "candidates",
    press: () => {
      entry.isOpen = !entry.isOpen;
      redraw();
    },
  });
  toggle.setAttribute("aria-expanded", String(entry.isOpen));
  toggle.setAttribute("aria-controls", `candidates-${drawing.id}`);
  return element(
    "div",
    { class: "card-actions" },
    button({ icon: "again", text: t("card.another"), press: () => actions.another(drawing.request), data: "another" }),
    button({ text: t("card.use_seed"), press: () => actions.useSeed(drawing.request), data: "seed" }),
    button({ text: t("card.use_settings"), press: () => actions.useSettings(drawing.request), data: "settings" }),
    numOthers ? toggle : null,
  );
}

function tilesOf(drawing, pictures, actions) {
  const tiles = pictures.map((each) => tileOf(drawing, drawing.pictures.indexOf(each), actions));
  return element("ul", { class: "tiles", "data-n": pictures.length }, ...tiles.map((tile) => element("li", {}, tile)));
}

/**
 * @param {Drawing} drawing
 * @param {number} index of the picture
 * @param {Pick<Actions, "open"|"favour"|"download">} actions
 * @returns {HTMLElement} a picture that opens, with its rank, its score, and a star
 */
export function tileOf(drawing, index, actions) {
  const shown = drawing.pictures[index];
  const alt = t("picture.alt", { caption: drawing.request.caption, rank: shown.rank });
  const open = element(
    "button",
    {
      type: "button",
      class: "picture",
      "data-action": `open-${index}`,
      "aria-label": t("picture.open", { alt }),
      on: { click: () => actions.open(drawing, index) },
    },
    picture(shown.blob, alt),
  );
  const star = button({
    icon: "star",
    label: t("picture.favourite", { rank: shown.rank }),
    class: "quiet icon-only star",
    pressed: shown.isFavourite,
    data: `star-${index}`,
    press: () => actions.favour(drawing, index, !shown.isFavourite),
  });
  const save = button({
    icon: "download",
    label: t("picture.download", { rank: shown.rank }),
    class: "quiet icon-only",
    data: `download-${index}`,
    press: () => actions.download(drawing, index),
  });
  const score =
    shown.score === null
      ? null
      : element("span", { class: "score numbers", text: formatScore(shown.score), title: t("picture.score") });
  return element(
    "figure",
    { class: "tile" },
    open,
    element(
      "figcaption",
      {},
      element("span", { class: "rank", text: t("picture.rank", { rank: shown.rank }) }),
      score,
      star,
      save,
    ),
  );
}
