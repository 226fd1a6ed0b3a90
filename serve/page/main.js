/**
 * Puts the page together: what is asked for goes into the queue, what comes out onto the board and into the gallery.
 */

import { ApiError, ConnectionLost, readModel } from "./api.js";
import { readGrammar, startBuilder } from "./builder.js";
import { startCaption } from "./caption.js";
import { startBoard } from "./cards.js";
import { compose, offeredTo } from "./composer.js";
import { startConnection, whenReady } from "./connection.js";
import { editPicture } from "./editor.js";
import { button, byId, tellBriefly } from "./elements.js";
import { startGallery } from "./gallery.js";
import { askForKey, startKeys } from "./keys.js";
import { startPreferences } from "./preferences.js";
import { ask } from "./question.js";
import { createQueue } from "./queue.js";
import { startRooms, goTo } from "./rooms.js";
import {
  SettingFault,
  limitSettings,
  randomSeed,
  readSettings,
  showSettingFault,
  startSettings,
  writeSettings,
} from "./settings.js";
import { StorageFull, askToPersist, openStore } from "./store.js";
import { fill, language, onLanguage, t } from "./texts.js";
import { UploadFault, squareOf, startDrops } from "./upload.js";
import { openViewer } from "./viewer.js";

const DRAWINGS_ON_BOARD = 6;
const PREVIEWS_UNKNOWN = 3; // what OpenAI's API knows

/** @typedef {import("./store.js").Drawing} Drawing */

/** The model that is served, once the server has told. */
let model = /** @type {import("./api.js").Model|null} */ (null);

async function start() {
  fill();
  startPreferences();
  startRooms();
  startConnection();
  startKeys();
  startSettings();
  const captionBox = startCaption();
  const store = await openStore();
  const page = { captionBox, store, unsaved: new Set() };

  const queue = createQueue({
    // One for each row of tokens, as far as the server lets.
    numPreviews: () => (model ? Math.min(model.grid_size, model.limits.partial_images) : PREVIEWS_UNKNOWN),
    onChange: (job, what) => {
      board.show(job, what);
      showSummary(queue);
      if (job.state === "done") void finish(page, board, gallery, job);
    },
  });
  const shared = {
    download,
    favour: (drawing, index, isFavourite) => favour(page, board, gallery, drawing, index, isFavourite),
    useSeed: ({ seed }) => {
      writeSettings({ seed });
      showForm(t("told.seed_used", { seed }));
    },
    useSettings: (request) => {
      captionBox.write(request.caption);
      writeSettings(request);
      showForm(t("told.settings_used"));
    },
    startFrom: (drawing, index, kind) => startFrom(queue, drawing.pictures[index].blob, kind, drawing.request),
    remove: (drawing, index) => removePicture(page, board, gallery, drawing, index),
  };
  const open = (drawing, index) => openViewer(drawing, index, shared);
  const board = startBoard({
    ...shared,
    open,
    cancel: queue.cancel,
    tryAgain: queue.again,
    another: (request) => queue.add({ ...request, seed: randomSeed() }),
    takeAway: (id) => board.remove(id),
  });
  const gallery = startGallery(store, { ...shared, open, clear: () => clearGallery(page, board, gallery) });

  listen(queue, captionBox);
  onLanguage(() => {
    showModel();
    showSummary(queue);
  });
  for (const drawing of await store.newest(null, DRAWINGS_ON_BOARD, () => true)) board.showDrawing(drawing);
  const grammar = await readGrammar();
  const builder = startBuilder(grammar, captionBox);
  showExamples(grammar, captionBox);
  await learnModel();
  if (!model) return;
  const offered = offeredTo(grammar, model.attributes);
  builder.offer(offered);
  showExamples(offered, captionBox);
}

// ------------------------------------------------------------------------------------------------------------- asking

/**
 * @param {import("./queue.js").Queue} queue
 * @param {import("./caption.js").CaptionBox} captionBox
 */
function listen(queue, captionBox) {
  const form = /** @type {HTMLFormElement} */ (byId("compose"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit(queue, captionBox);
  });
  form.addEventListener("keydown", (event) => {
    // Enter that ends a Korean syllable belongs to the input method.
    if (event.key !== "Enter" || event.isComposing) return;
    const isCaption = event.target === byId("caption") && !event.shiftKey;
    if (!isCaption && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    submit(queue, captionBox);
  });
  byId("cancel-all").addEventListener("click", queue.cancelAll);
  const file = /** @type {HTMLInputElement} */ (byId("upload-file"));
  byId("upload").addEventListener("click", () => file.click());
  const take = (given) => startFromFile(queue, captionBox, given);
  file.addEventListener("change", () => {
    if (file.files[0]) void take(file.files[0]);
    file.value = "";
  });
  startDrops(take);
  window.addEventListener("beforeunload", (event) => {
    if (queue.active().length) event.preventDefault();
  });
}

function submit(queue, captionBox) {
  if (captionBox.fault()) {
    captionBox.showFault();
    return;
  }
  const settings = settingsOrNull();
  if (settings) {
    queue.add({
      ...settings,
      kind: "new",
      caption: captionBox.read(),
      seed: settings.seed || randomSeed(),
      keepRows: null,
      image: null,
      mask: null,
    });
    if (window.matchMedia("(max-width: 899px)").matches) byId("board").scrollIntoView();
  }
}

/** @returns {import("./settings.js").Settings|null} null when one does not fit, which is then told */
function settingsOrNull() {
  try {
    return readSettings();
  } catch (error) {
    if (!(error instanceof SettingFault)) throw error;
    showSettingFault(error);
    return null;
  }
}

async function startFromFile(queue, captionBox, file) {
  const settings = settingsOrNull();
  if (!settings) return;
  try {
    const square = await squareOf(file);
    await startFrom(queue, square, "rows", { ...settings, caption: captionBox.read() });
  } catch (error) {
    if (!(error instanceof UploadFault)) throw error;
    tellBriefly(t(`upload.${error.reason}`));
  }
}

async function startFrom(queue, blob, kind, base) {
  if (!model) await learnModel();
  if (!model) return;
  goTo("studio");
  const request = await editPicture(blob, kind, base, model.grid_size);
  if (!request) return;
  queue.add(request);
  byId("board").scrollIntoView();
}

/** @param {import("./queue.js").Queue} queue */
function showSummary(queue) {
  const active = queue.active();
  const numRunning = active.filter((job) => job.state !== "waiting").length;
  const told = [
    numRunning ? t("board.running", { n: numRunning }) : "",
    active.length > numRunning ? t("board.waiting", { n: active.length - numRunning }) : "",
  ];
  byId("queue-summary").textContent = told.filter(Boolean).join(" · ");
  byId("cancel-all").hidden = active.length < 2;
}

/**
 * @param {import("./composer.js").Grammar} grammar
 * @param {import("./caption.js").CaptionBox} captionBox
 */
function showExamples(grammar, captionBox) {
  onLanguage(() => {
    const use = (example) => () => {
      captionBox.write(compose(grammar, example.label));
      byId("draw").focus();
    };
    byId("examples").replaceChildren(
      ...grammar.examples.map((example) => button({ text: example[language()], class: "chip", press: use(example) })),
    );
  });
}

function showForm(text) {
  goTo("studio");
  byId("compose").scrollIntoView();
  byId("draw").focus({ preventScroll: true });
  tellBriefly(text);
}

// ------------------------------------------------------------------------------------------------------------ keeping

async function finish(page, board, gallery, job) {
  const { id, createdMs, request, pictures, tokensCut, totalS } = job;
  const about = { modelId: model?.id ?? "", modelDigest: model?.digest ?? "", gridSize: model?.grid_size ?? 0 };
  /** @type {Drawing} */
  const drawing = { id, createdMs, request, ...about, tokensCut, totalS, pictures };
  board.showDrawing(drawing);
  try {
    await page.store.put(drawing);
    await gallery.refresh();
  } catch (error) {
    page.unsaved.add(id);
    const text = t(error instanceof StorageFull ? "gallery.full" : "gallery.not_saved");
    console.warn("a drawing was not kept:", error);
    board.warn(id, text);
    gallery.tellFault(text);
    tellBriefly(text);
  }
}

/**
 * @param {(drawing: Drawing) => Drawing|null} edit
 * @returns {Promise<Drawing|null>} as it is now; null when nothing is left of it
 */
async function change(page, board, gallery, drawing, edit) {
  const changed = page.unsaved.has(drawing.id)
    ? edit(drawing)
    : await page.store.change(drawing.id, (kept) => edit(kept));
  if (changed) board.update(changed);
  else board.remove(drawing.id);
  await gallery.refresh();
  return changed;
}

async function favour(page, board, gallery, drawing, index, isFavourite) {
  const { candidate } = drawing.pictures[index];
  const edit = (each) => ({
    ...each,
    pictures: each.pictures.map((one) => (one.candidate === candidate ? { ...one, isFavourite } : one)),
  });
  const changed = await change(page, board, gallery, drawing, edit);
  if (isFavourite) void askToPersist();
  return changed ?? edit(drawing);
}

async function removePicture(page, board, gallery, drawing, index) {
  const { candidate, rank } = drawing.pictures[index];
  const said = await ask({
    title: t("remove.title"),
    text: t("remove.text", { rank }),
    yes: t("remove.yes"),
    isGrave: true,
  });
  if (!said) return false;
  await change(page, board, gallery, drawing, (each) => {
    const pictures = each.pictures.filter((one) => one.candidate !== candidate);
    // A drawing of which only unshown candidates are left has been deleted, as far as anybody can see.
    return pictures.some((one) => one.isShown || one.isFavourite) ? { ...each, pictures } : null;
  });
  return true;
}

async function clearGallery(page, board, gallery) {
  const text = t("clear.text", { n: await page.store.count() });
  if (!(await ask({ title: t("clear.title"), text, yes: t("clear.yes"), isGrave: true }))) return;
  await page.store.clear();
  board.clear();
  gallery.tellFault("");
  await gallery.refresh();
}

function download(drawing, index) {
  const { blob, candidate } = drawing.pictures[index];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `kodalle-${drawing.request.seed}-${candidate}.png`;
  link.click();
  // The browser reads the address after this call has returned.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---------------------------------------------------------------------------------------------------------- the server

/** Asks what is served, as often as it takes; a server that wants a key asks for one. */
async function learnModel() {
  for (;;) {
    try {
      model = await readModel();
      limitSettings(model);
      showModel();
      return;
    } catch (error) {
      if (error instanceof ConnectionLost) await whenReady();
      else if (error instanceof ApiError && error.status === 401) {
        if (!(await askForKey(true))) return;
      } else {
        console.error(error);
        tellBriefly(error instanceof ApiError ? error.told : t("error.connection"));
        return;
      }
    }
  }
}

function showModel() {
  if (!model) return;
  byId("model-info").textContent = t("foot.model", {
    id: model.id,
    size: model.image_size,
    tokens: model.text_seq_len,
    device: model.device === "cpu" ? "CPU" : model.device,
  });
}

await start();
