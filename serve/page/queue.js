/**
 * The drawings that are asked for, in order: a few at the server at a time, the rest waiting here.
 *
 * A browser opens six connections to a server; a drawing holds one for as long as it lasts. Two at a time keep the
 * server's slots filled and leave connections for everything else. What was sent has its seed fixed, so sending it again
 * after a broken connection or a busy server gives the same pictures.
 */

import { ApiError, ConnectionLost, blobOf, draw } from "./api.js";
import { whenReady } from "./connection.js";
import { askForKey } from "./keys.js";
import { newId } from "./store.js";

const MOST_AT_ONCE = 2;
const MOST_TRIES = 5;
// By code, because an error may also come inside a stream, whose status was 200 (serve/api/errors.py).
const BUSY = ["queue_full", "rate_limit_exceeded", "unavailable"];

/**
 * @typedef {"waiting"|"sent"|"queued"|"drawing"|"busy"|"lost"|"done"|"failed"|"cancelled"} State
 *   waiting: here; queued: at the server; busy: the server had no room, asked again later; lost: no connection
 *
 * @typedef {object} Job
 * @property {string} id
 * @property {number} createdMs
 * @property {import("./api.js").ImageRequest} request
 * @property {State} state
 * @property {number} position at the server, 1 is next; 0 unless queued
 * @property {number|null} waitS estimated, of "queued" and "busy"
 * @property {number} tokensGenerated
 * @property {number} tokensTotal
 * @property {Map<number, {blob: Blob, rowsGenerated: number, rowsTotal: number}>} previews by candidate
 * @property {import("./store.js").Picture[]} pictures
 * @property {number} tokensCut
 * @property {number|null} totalS
 * @property {ApiError|null} error of "failed"
 * @property {number} tries
 * @property {AbortController} hangUp
 *
 * @typedef {object} Queue
 * @property {(request: import("./api.js").ImageRequest) => Job} add
 * @property {(job: Job) => void} cancel
 * @property {() => void} cancelAll
 * @property {(job: Job) => void} again a job that failed or was cancelled
 * @property {() => Job[]} active those that wait or draw, in order
 */

/**
 * @param {{numPreviews: () => number, onChange: (job: Job, what: "state"|"progress"|"preview") => void}} around
 *   `numPreviews`: of each picture that is drawn
 * @returns {Queue}
 */
export function createQueue({ numPreviews, onChange }) {
  /** @type {Job[]} */
  let jobs = [];

  const change = (job, state, values = {}) => {
    Object.assign(job, { position: 0, waitS: null }, values, { state });
    if (["done", "failed", "cancelled"].includes(state)) jobs = jobs.filter((other) => other !== job);
    onChange(job, "state");
    next();
  };

  const next = () => {
    const numRunning = jobs.filter((job) => job.state !== "waiting").length;
    for (const job of jobs
      .filter((each) => each.state === "waiting")
      .slice(0, Math.max(0, MOST_AT_ONCE - numRunning))) {
      // Marked at once, so that a second call of `next` does not start it again.
      job.state = "sent";
      onChange(job, "state");
      void run(job);
    }
  };

  const run = async (job) => {
    const { signal } = job.hangUp;
    Object.assign(job, noResults());
    job.tries += 1;
    try {
      for await (const event of draw(job.request, numPreviews(), signal)) take(job, event, change, onChange);
      job.pictures.sort((one, other) => one.rank - other.rank);
      change(job, "done");
    } catch (error) {
      if (signal.aborted) return;
      await recover(job, error, change);
    }
  };

  const cancel = (job) => {
    job.hangUp.abort();
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
    cancel,
    cancelAll: () => [...jobs].reverse().forEach(cancel),
    again: (job) => {
      Object.assign(job, { hangUp: new AbortController(), error: null, tries: 0 });
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
    tries: 0,
    error: null,
    hangUp: new AbortController(),
    ...noResults(),
  };
}

/** @returns {Pick<Job, "tokensGenerated"|"tokensTotal"|"previews"|"pictures"|"tokensCut"|"totalS">} */
function noResults() {
  return { tokensGenerated: 0, tokensTotal: 0, previews: new Map(), pictures: [], tokensCut: 0, totalS: null };
}

/**
 * What went wrong, and what is done about it: a key is asked for, a busy server asked again, a lost one waited for.
 * @param {Job} job
 * @param {unknown} error
 * @param {(job: Job, state: State, values?: Partial<Job>) => void} change
 */
async function recover(job, error, change) {
  const { signal } = job.hangUp;
  const mayRetry = job.tries < MOST_TRIES;
  if (error instanceof ConnectionLost && mayRetry) {
    change(job, "lost");
    await whenReady();
    if (!signal.aborted) change(job, "waiting");
  } else if (error instanceof ApiError && error.status === 401) {
    change(job, "busy");
    const isGiven = await askForKey(true);
    if (!signal.aborted) change(job, isGiven ? "waiting" : "failed", { error: isGiven ? null : error });
  } else if (error instanceof ApiError && BUSY.includes(error.code) && mayRetry) {
    const waitS = Math.min(60, Math.max(1, error.retryAfterS ?? 2 ** job.tries));
    change(job, "busy", { waitS });
    await new Promise((resolve) => setTimeout(resolve, waitS * 1000));
    if (!signal.aborted) change(job, "waiting");
  } else if (error instanceof ApiError) {
    change(job, "failed", { error });
  } else {
    if (!(error instanceof ConnectionLost)) console.error(error);
    change(job, "failed", { error: null });
  }
}

/**
 * @param {Job} job
 * @param {Record<string, any>} event
 * @param {(job: Job, state: State, values?: Partial<Job>) => void} change
 * @param {(job: Job, what: "progress"|"preview") => void} onChange
 */
function take(job, event, change, onChange) {
  const what = event.type.slice(event.type.lastIndexOf(".") + 1);
  if (what === "queued") {
    change(job, "queued", { position: event.position, waitS: event.wait_s ?? null });
    return;
  }
  if (job.state !== "drawing") change(job, "drawing");
  if (what === "progress") {
    Object.assign(job, { tokensGenerated: event.tokens_generated, tokensTotal: event.tokens_total });
    onChange(job, "progress");
  } else if (what === "partial_image") {
    const blob = blobOf(event.b64_json, event.output_format);
    job.previews.set(event.image_index, { blob, rowsGenerated: event.rows_generated, rowsTotal: event.rows_total });
    onChange(job, "preview");
  } else if (what === "candidate" || what === "completed") {
    job.pictures.push({
      candidate: event.candidate,
      rank: event.rank,
      score: event.clip_score ?? null,
      blob: blobOf(event.b64_json, event.output_format),
      isShown: what === "completed",
      isFavourite: false,
    });
    job.tokensCut = event.tokens_cut ?? job.tokensCut;
    job.totalS = event.timings_s?.total ?? job.totalS;
  }
}
