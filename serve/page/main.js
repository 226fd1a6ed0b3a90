/**
 * Puts the page together: requests go into the queue, results onto the board and into the gallery.
 */

import { startCaption } from "./caption.js";
import { startBoard } from "./cards.js";
import { comparePictures } from "./compare.js";
import { startConnection } from "./connection.js";
import { editImage } from "./editor.js";
import { announce, byId, showBriefly } from "./elements.js";
import { savePdf, saveZip } from "./exports.js";
import { startGallery } from "./gallery.js";
import { startKeys } from "./keys.js";
import { startLayout } from "./layout.js";
import { createLibrary, download } from "./library.js";
import { loadModel, onModel, servedModel } from "./model.js";
import { startPreferences } from "./preferences.js";
import { createQueue } from "./queue.js";
import { SettingFault, randomSeed, readSettings, showSettingFault, startSettings, writeSettings } from "./settings.js";
import { fillForm, sharedInFile, startLinks } from "./shared.js";
import { startSheetForm } from "./sheet_form.js";
import { startSheets } from "./sheets.js";
import { newId, openStore } from "./store.js";
import { fill, onLanguage, t } from "./texts.js";
import { createUnended } from "./unended.js";
import { UploadFault, squareOf, startDrops } from "./upload.js";
import { openViewer } from "./viewer.js";
import { goTo, startViews } from "./views.js";
import { startWindows } from "./windows.js";

const GENERATIONS_ON_BOARD = 6;
const PREVIEWS_UNKNOWN = 3; // the most that OpenAI's API allows

/**
 * @typedef {import("./caption.js").CaptionBox} CaptionBox
 * @typedef {import("./queue.js").Queue} Queue
 * @typedef {import("./settings.js").Settings & {caption: string}} Base
 * @typedef {import("./store.js").Generation} Generation
 */

async function start() {
  fill();
  startPreferences();
  startViews();
  startLayout();
  startConnection();
  startKeys();
  startSettings();
  const captionBox = startCaption();
  const store = await openStore();
  const unended = createUnended(store);

  const queue = createQueue({
    // One for each row of tokens, as far as the server allows.
    numPreviews: () => {
      const model = servedModel();
      return model ? Math.min(model.grid_size, model.limits.partial_images) : PREVIEWS_UNKNOWN;
    },
    onChange: (job, what) => {
      board.show(job, what);
      showSummary(queue);
      if (what === "state") void unended.note(job);
      if (job.state !== "done") return;
      void library.add(job, servedModel());
      void loadModel(captionBox); // where the key came only with this request
    },
  });
  const actions = {
    download,
    favour: (/** @type {Generation} */ generation, /** @type {number} */ index, /** @type {boolean} */ isFavourite) =>
      library.favour(generation, index, isFavourite),
    useSeed: (/** @type {import("./api.js").ImageRequest} */ { seed }) => {
      writeSettings({ seed });
      showForm(t("announce.seed_used", { seed }));
    },
    useSettings: (/** @type {import("./api.js").ImageRequest} */ request) => {
      captionBox.write(request.caption);
      writeSettings(request);
      showForm(t("announce.settings_used"));
    },
    startFrom: (
      /** @type {Generation} */ generation,
      /** @type {number} */ index,
      /** @type {"rows"|"mask"|"strength"} */ kind,
    ) => startFrom(queue, captionBox, generation.images[index].blob, kind, generation.request),
    remove: (/** @type {Generation} */ generation, /** @type {number} */ index) =>
      library.removeImage(generation, index),
    collect: (/** @type {import("./library.js").Picture[]} */ pictures) => library.collect(pictures),
    open: (/** @type {Generation} */ generation, /** @type {number} */ index) => openViewer(generation, index, actions),
  };
  const boardActions = {
    ...actions,
    cancel: queue.cancel,
    retry: queue.retry,
    another: (/** @type {import("./api.js").ImageRequest} */ request) => queue.add({ ...request, seed: randomSeed() }),
    dismiss: (/** @type {string} */ id) => {
      board.remove(id);
      void unended.forget(id);
    },
  };
  const board = startSheets(startBoard(boardActions), boardActions, store);
  const report = startWindows((news) => void library.follow(news));
  const gallery = startGallery(store, {
    ...actions,
    ...{ compare: comparePictures, saveZip, savePdf },
    clear: () => library.clear(),
    removeImages: (pictures) => library.removeImages(pictures),
    stripCollection: (id) => library.stripCollection(id),
    reportCollections: () => report("collections"),
  });
  const library = createLibrary(store, board, gallery, report);

  listen(queue, captionBox, store.isLasting);
  onModel((grammar) =>
    startSheetForm(grammar, captionBox, {
      numCandidates: () => Number(/** @type {HTMLInputElement} */ (byId("candidates")).value) || 0,
      submit: (wanted) => submitSheet(queue, wanted),
    }),
  );
  onLanguage(() => showSummary(queue));
  for (const generation of await store.newest(null, GENERATIONS_ON_BOARD, () => true)) board.showGeneration(generation);
  await unended.take(queue.restore);
  await board.complete();
  await loadModel(captionBox);
  startLinks(captionBox);
}

/**
 * @param {Queue} queue
 * @param {CaptionBox} captionBox
 * @param {boolean} isLasting whether requests outlive the page
 */
function listen(queue, captionBox, isLasting) {
  const form = byId("compose");
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
  const input = /** @type {HTMLInputElement} */ (byId("upload-file"));
  byId("upload").addEventListener("click", () => input.click());
  /** @param {File} file */
  const take = (file) => startFromFile(queue, captionBox, file);
  input.addEventListener("change", () => {
    if (input.files?.[0]) void take(input.files[0]);
    input.value = "";
  });
  startDrops((file) => takeDropped(queue, captionBox, file));
  window.addEventListener("beforeunload", (event) => {
    if (!isLasting && queue.active().length) event.preventDefault();
  });
}

/**
 * @param {Queue} queue
 * @param {CaptionBox} captionBox
 */
function submit(queue, captionBox) {
  if (captionBox.fault()) {
    captionBox.showFault();
    return;
  }
  const settings = settingsOrNull();
  if (!settings) return;
  queue.add({
    ...settings,
    kind: "new",
    caption: captionBox.read(),
    seed: settings.seed || randomSeed(),
    keepRows: null,
    image: null,
    mask: null,
  });
  showBoard();
}

/**
 * @param {Queue} queue
 * @param {import("./sheet_form.js").Wanted} wanted
 */
function submitSheet(queue, { caption, axes, captions }) {
  const settings = settingsOrNull(axes.length ? 1 : null); // a cell shows one image
  if (!settings) return;
  const seed = settings.seed || randomSeed();
  const common = { kind: /** @type {"new"} */ ("new"), keepRows: null, image: null, mask: null };
  const shared = { id: newId(), caption, axes, numCells: captions.length };
  captions.forEach((each, cell) =>
    queue.add({ ...settings, ...common, seed, caption: each, sheet: { ...shared, cell } }),
  );
  announce(t("sheet.started", { n: captions.length }));
  showBoard();
}

/** Where the board is below the form. */
function showBoard() {
  if (window.matchMedia("(max-width: 899px)").matches) byId("board").scrollIntoView();
}

/**
 * @param {number|null} [n] images shown, where the form does not decide it
 * @returns {import("./settings.js").Settings|null} null when one is out of bounds, which is then shown
 */
function settingsOrNull(n = null) {
  try {
    return readSettings(n);
  } catch (error) {
    if (!(error instanceof SettingFault)) throw error;
    showSettingFault(error);
    return null;
  }
}

/**
 * @param {Queue} queue
 * @param {CaptionBox} captionBox
 * @param {File} file
 */
async function startFromFile(queue, captionBox, file) {
  const settings = settingsOrNull();
  if (!settings) return;
  try {
    const square = await squareOf(file);
    await startFrom(queue, captionBox, square, "rows", { ...settings, caption: captionBox.read() });
  } catch (error) {
    if (!(error instanceof UploadFault)) throw error;
    showBriefly(t(`upload.${error.reason}`));
  }
}

/**
 * Caption and settings, where the file has them; else an image to start from.
 * @param {Queue} queue
 * @param {CaptionBox} captionBox
 * @param {File} file
 */
async function takeDropped(queue, captionBox, file) {
  const shared = await sharedInFile(file);
  if (shared) {
    goTo("studio");
    const text = [t("shared.file", { file: file.name }), shared.remark].filter(Boolean).join(" ");
    if (fillForm(shared, captionBox)) showBriefly(text);
  } else if (file.type.startsWith("image/")) await startFromFile(queue, captionBox, file);
  else showBriefly(t("shared.foreign", { file: file.name }));
}

/**
 * @param {Queue} queue
 * @param {CaptionBox} captionBox
 * @param {Blob} blob the init image
 * @param {"rows"|"mask"|"strength"} kind
 * @param {Base} base
 */
async function startFrom(queue, captionBox, blob, kind, base) {
  const model = await loadModel(captionBox);
  if (!model) return;
  goTo("studio");
  const request = await editImage(blob, kind, base, model.grid_size);
  if (!request) return;
  queue.add(request);
  byId("board").scrollIntoView();
}

/** @param {Queue} queue */
function showSummary(queue) {
  const active = queue.active();
  const numRunning = active.filter((job) => job.state !== "waiting").length;
  const parts = [
    numRunning ? t("board.running", { n: numRunning }) : "",
    active.length > numRunning ? t("board.waiting", { n: active.length - numRunning }) : "",
  ];
  byId("queue-summary").textContent = parts.filter(Boolean).join(" · ");
  byId("cancel-all").hidden = active.length < 2;
}

/** @param {string} text */
function showForm(text) {
  goTo("studio");
  byId("compose").scrollIntoView();
  byId("generate").focus({ preventScroll: true });
  showBriefly(text);
}

await start();
