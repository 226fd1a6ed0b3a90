/**
 * The queue of requested generations: a few at the server at a time, the rest waiting here.
 *
 * A browser opens six connections to a server, and a generation holds one for as long as it lasts. Two at a time keep
 * the server's slots filled and leave connections for everything else. The seed is fixed before a request is sent, so
 * sending it again after a broken connection or to a busy server returns the same images.
 */

import { ApiError, ConnectionLost, blobOf, generate } from "./api.js";
import { whenReady } from "./connection.js";
import { askForKey } from "./keys.js";
import { newId } from "./store.js";

const MOST_AT_ONCE = 2;
// Of a connection that breaks: the request itself may be what ends it. A busy server is waited for as long as it takes.
const MOST_LOST = 5;
// By code, because an error may also come inside a stream, whose status was 200 (serve/api/errors.py).
const BUSY = ["queue_full", "rate_limit_exceeded", "unavailable"];

/**
 * @typedef {"waiting"|"sent"|"queued"|"generating"|"busy"|"offline"|"done"|"failed"|"cancelled"|"interrupted"} State
 *   waiting: here; queued: at the server; busy: refused for want of a slot, sent again later; offline: no connection;
 *   interrupted: its page was closed before it was done
 *
 * @typedef {object} Job
 * @property {string} id
 * @property {number} createdMs
 * @property {import("./api.js").ImageRequest} request
 * @property {State} state
 * @property {number} position at the server, 1 is next; 0 unless queued
 * @property {number|null} waitS of "queued" estimated, of "busy" what is left until it is sent again
 * @property {boolean} isLimited whether it is "busy" because of its key's rate
 * @property {number} tokensGenerated
 * @property {number} tokensTotal
 * @property {Map<number, {blob: Blob, rowsGenerated: number, rowsTotal: number}>} previews by candidate
 * @property {import("./store.js").RankedImage[]} images
 * @property {number} tokensCut
 * @property {{total: number, known: number, unknown: string[]}|null} words of the caption, as the model knows them
 * @property {number|null} totalS
 * @property {ApiError|null} error of "failed"
 * @property {number} numBusy refusals by a busy server, one after the other
 * @property {number} numLost connections that broke
 * @property {AbortController} abort
 *
 * @typedef {object} Queue
 * @property {(request: import("./api.js").ImageRequest) => Job} add
 * @property {(stored: import("./store.js").StoredRequest, goesOn: boolean) => void} restore a request that an earlier page
 *   did not end: sent at once, or only when it is tried again
 * @property {(job: Job) => void} cancel
 * @property {() => void} cancelAll
 * @property {(job: Job) => void} retry a job that failed or was cancelled
 * @property {() => Job[]} active those that wait or are being generated, in order
 *
 * @typedef {(job: Job, state: State, values?: Partial<Job>) => void} Change
 * @typedef {(job: Job, what: "state"|"progress"|"preview"|"wait") => void} OnChange
 */

/**
 * @param {{numPreviews: () => number, onChange: OnChange}} options `numPreviews`: of each image
 * @returns {Queue}
 */
export function createQueue({ numPreviews, onChange }) {
  /** @type {Job[]} */
  let jobs = [];

  /** @type {Change} */
  const change = (job, state, values = {}) => {
    Object.assign(job, { position: 0, waitS: null }, values, { state });
    if (["done", "failed", "cancelled"].includes(state)) jobs = jobs.filter((other) => other !== job);
    onChange(job, "state");
    next();
  };

  const next = () => {
    const numRunning = jobs.filter((job) => job.state !== "waiting").length;
    // A single request does not wait for the rest of a sheet.
    const waiting = jobs
      .filter((each) => each.state === "waiting")
      .sort((one, other) => Number(Boolean(one.request.sheet)) - Number(Boolean(other.request.sheet)));
    for (const job of waiting.slice(0, Math.max(0, MOST_AT_ONCE - numRunning))) {
      // Marked at once, so that a second call of `next` does not start it again.
      job.state = "sent";
      onChange(job, "state");
      void run(job);
    }
  };

  /** @param {Job} job */
  const run = async (job) => {
    const { signal } = job.abort;
    Object.assign(job, noResults());
    try {
      for await (const event of generate(job.request, numPreviews(), signal)) handleEvent(job, event, change, onChange);
      job.images.sort((one, other) => one.rank - other.rank);
      change(job, "done");
    } catch (error) {
      if (signal.aborted) return;
      await recover(job, error, change, onChange);
    }
  };

  /** @param {Job} job */
  const cancel = (job) => {
    job.abort.abort();
    change(job, "cancelled");
  };

  return {
    add: (request) => {
      const job = newJob(request);
      jobs.push(job);
      onChange(job, "state");
      next();
      return job;
    },
    restore: ({ id, createdMs, request }, goesOn) => {
      const job = { ...newJob(request), id, createdMs };
      if (goesOn) jobs.push(job);
      change(job, goesOn ? "waiting" : "interrupted");
    },
    cancel,
    cancelAll: () => [...jobs].reverse().forEach(cancel),
    retry: (job) => {
      Object.assign(job, { abort: new AbortController(), error: null, numBusy: 0, numLost: 0 });
      jobs.push(job);
      change(job, "waiting");
    },
    active: () => [...jobs],
  };
}

/**
 * @param {import("./api.js").ImageRequest} request
 * @returns {Job}
 */
function newJob(request) {
  return {
    id: newId(),
    createdMs: Date.now(),
    request,
    state: "waiting",
    position: 0,
    waitS: null,
    isLimited: false,
    numBusy: 0,
    numLost: 0,
    error: null,
    abort: new AbortController(),
    ...noResults(),
  };
}

/** @returns {Pick<Job, "tokensGenerated"|"tokensTotal"|"previews"|"images"|"tokensCut"|"words"|"totalS">} */
function noResults() {
  return { tokensGenerated: 0, tokensTotal: 0, previews: new Map(), images: [], tokensCut: 0, words: null, totalS: null };
}

/**
 * What follows from an error: a key is requested, a busy server is tried again, and a lost connection is waited for.
 * @param {Job} job
 * @param {unknown} error
 * @param {Change} change
 * @param {OnChange} onChange
 */
async function recover(job, error, change, onChange) {
  const { signal } = job.abort;
  if (error instanceof ConnectionLost && ++job.numLost < MOST_LOST) {
    change(job, "offline");
    await whenReady();
    if (!signal.aborted) change(job, "waiting");
  } else if (error instanceof ApiError && error.status === 401) {
    change(job, "busy");
    const hasKey = await askForKey(true);
    if (!signal.aborted) change(job, hasKey ? "waiting" : "failed", { error: hasKey ? null : error });
  } else if (error instanceof ApiError && BUSY.includes(error.code ?? "")) {
    const waitS = Math.max(1, error.retryAfterS ?? Math.min(60, 2 ** job.numBusy));
    change(job, "busy", { waitS, numBusy: job.numBusy + 1, isLimited: error.code === "rate_limit_exceeded" });
    await countDown(job, waitS, onChange);
    if (!signal.aborted) change(job, "waiting");
  } else if (error instanceof ApiError) {
    change(job, "failed", { error });
  } else {
    if (!(error instanceof ConnectionLost)) console.error(error);
    change(job, "failed", { error: null });
  }
}

/**
 * Waits, and says each second how long still; cancelling ends it.
 * @param {Job} job
 * @param {number} seconds
 * @param {OnChange} onChange
 */
async function countDown(job, seconds, onChange) {
  const { signal } = job.abort;
  const endsMs = Date.now() + seconds * 1000; // by the clock: timers of hidden pages are late
  for (let leftMs = seconds * 1000; leftMs > 0 && !signal.aborted; leftMs = endsMs - Date.now()) {
    job.waitS = leftMs / 1000;
    onChange(job, "wait");
    await new Promise((resolve) => setTimeout(resolve, Math.min(leftMs, 1000)));
  }
}

/**
 * @param {Job} job
 * @param {import("./api.js").StreamEvent} event
 * @param {Change} change
 * @param {OnChange} onChange
 */
function handleEvent(job, event, change, onChange) {
  const what = event.type.slice(event.type.lastIndexOf(".") + 1);
  if (what === "queued") {
    change(job, "queued", { position: event.position, waitS: event.wait_s ?? null });
    return;
  }
  if (job.state !== "generating") change(job, "generating", { numBusy: 0 });
  if (what === "progress") {
    Object.assign(job, { tokensGenerated: event.tokens_generated, tokensTotal: event.tokens_total });
    onChange(job, "progress");
  } else if (what === "partial_image") {
    const blob = blobOf(event.b64_json, event.output_format);
    job.previews.set(event.image_index, { blob, rowsGenerated: event.rows_generated, rowsTotal: event.rows_total });
    onChange(job, "preview");
  } else if (what === "candidate" || what === "completed") {
    job.images.push({
      candidate: event.candidate,
      rank: event.rank,
      score: event.clip_score ?? null,
      percentile: event.clip_score_percentile ?? null,
      blob: blobOf(event.b64_json, event.output_format),
      isShown: what === "completed",
      isFavourite: false,
    });
    job.tokensCut = event.tokens_cut ?? job.tokensCut;
    if (event.words_unknown)
      job.words = { total: event.words_total, known: event.words_known, unknown: event.words_unknown };
    job.totalS = event.timings_s?.total ?? job.totalS;
  }
}
