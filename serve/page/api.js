/**
 * A client of the server's public API: the page uses nothing that a program could not.
 *
 * A seed is text from end to end: it goes up to 2**64 - 1, and a JavaScript number would round it from 2**53 on.
 */

import { readEvents } from "./events.js";
import { currentKey } from "./keys.js";
import { language, t } from "./texts.js";

/**
 * Everything that determines the images.
 * @typedef {object} ImageRequest
 * @property {"new"|"rows"|"mask"|"strength"} kind from the caption alone; from the top rows of an init image; from an
 *   init image with a marked part to inpaint; from one of which the model chooses what to generate anew
 * @property {string} caption
 * @property {number} n images shown
 * @property {number} candidates images generated and ranked
 * @property {string} seed decimal digits, 0 to 2**64 - 1
 * @property {number} temperature
 * @property {number|null} topK
 * @property {number|null} topP
 * @property {number} guidance
 * @property {number|null} keepRows rows of tokens kept, for "rows"
 * @property {number|null} [strength] share of the tokens generated anew, for "strength"
 * @property {string|null} [changedFrom] caption of the init image: only what the changed words touch, for "strength"
 * @property {Blob|null} image the init image, but for "new"
 * @property {Blob|null} mask PNG, as large as the image, transparent where to inpaint, for "mask"
 * @property {import("./sheet.js").SheetPlace} [sheet] that it is part of; it determines no image
 *
 * @typedef {object} Model
 * @property {string} id
 * @property {number} image_size side of its images in pixels
 * @property {number} max_size the largest side that images are enlarged to
 * @property {number} grid_size rows of tokens in an image
 * @property {number} text_seq_len tokens of a caption
 * @property {string} digest
 * @property {string} device
 * @property {number} default_candidates
 * @property {import("./composer.js").CaptionGuide} caption_guide
 * @property {{temperature: number, top_k: number|null, top_p: number|null, guidance_scale: number}} default_sampling_params
 * @property {Record<"n"|"candidates"|"temperature"|"top_k"|"top_p"|"guidance_scale",
 *   import("./settings.js").Bounds>} sampling_params
 * @property {{images: number, candidates: number, partial_images: number}} limits
 *
 * @typedef {object} PromptTokens
 * @property {number} tokens
 * @property {number} limit
 * @property {number} words_total
 * @property {number} words_known
 * @property {import("./unknown_words.js").UnknownWord[]} unknown
 *
 * @typedef {Record<string, any> & {type: string}} StreamEvent as the API documents them, by their type
 */

const ROOT = new URL("../", import.meta.url);
// The server writes a comment or an event at least every 10 s; silence for several times that is a dead connection.
const SILENCE_S = 45;

/** An answer that is no success. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {{message?: string, message_ko?: string, code?: string|null, param?: string|null}} details
   * @param {number|null} retryAfterS
   */
  constructor(status, details, retryAfterS = null) {
    super(details.message || `HTTP ${status}`);
    this.status = status;
    this.details = details;
    this.code = details.code ?? null;
    this.param = details.param ?? null;
    this.retryAfterS = retryAfterS;
  }

  /** @returns {string} in the language shown */
  get text() {
    const korean = language() === "ko" ? this.details.message_ko : null;
    return korean || this.details.message || t("error.status", { status: this.status });
  }
}

/** No answer, or one that broke off: the server or the network is down. */
export class ConnectionLost extends Error {}

/**
 * @param {string} path below the server's root
 * @param {RequestInit} [options]
 * @returns {Promise<Response>} a success
 * @throws {ApiError|ConnectionLost} or the signal's reason when it was aborted
 */
async function call(path, options = {}) {
  const key = currentKey();
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    options.signal?.throwIfAborted();
    throw new ConnectionLost(String(error));
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/**
 * @param {Response} response
 * @returns {Promise<ApiError|ConnectionLost>}
 */
async function errorOf(response) {
  const body = await response.json().catch(() => null);
  // A gateway that answers for a server that is down has no error body of ours.
  if (!body?.error && [502, 503, 504].includes(response.status)) return new ConnectionLost(`HTTP ${response.status}`);
  const after = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ApiError(response.status, body?.error ?? {}, Number.isFinite(after) ? after : null);
}

/**
 * @returns {Promise<Model>} the model that this server runs
 */
export async function readModel() {
  const list = await (await call("v1/models")).json();
  return list.data[0];
}

/**
 * @returns {Promise<boolean>} whether the server takes requests
 */
export async function isReady() {
  try {
    return (await fetch(new URL("readyz", ROOT), { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/**
 * @param {string} prompt
 * @param {AbortSignal} signal
 * @returns {Promise<PromptTokens>}
 */
export async function countTokens(prompt, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await call("v1/tokenize", { method: "POST", headers, body: JSON.stringify({ prompt }), signal })).json();
}

/**
 * Generates images, and yields events while it does.
 * @param {ImageRequest} request
 * @param {number} numPreviews of each image
 * @param {AbortSignal} signal aborting closes the connection, which cancels the generation on the server
 * @param {Record<string, string|boolean>} [others] fields by the API's names
 * @returns {AsyncGenerator<StreamEvent>}
 * @throws {ApiError|ConnectionLost}
 */
export async function* generate(request, numPreviews, signal, others = {}) {
  const silence = new AbortController();
  const both = AbortSignal.any([signal, silence.signal]);
  const watchdog = startWatchdog(() => silence.abort(new ConnectionLost("silence")), SILENCE_S);
  let isComplete = false;
  try {
    const response = await send(request, numPreviews, both, others);
    for await (const { data } of readEvents(watched(/** @type {ReadableStream<Uint8Array>} */ (response.body), watchdog))) {
      if (data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(200, event.error);
      isComplete ||= event.type.endsWith(".completed");
      yield event;
    }
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof ApiError) throw error;
    throw new ConnectionLost(String(error));
  } finally {
    watchdog.stop();
  }
  if (!isComplete) throw new ConnectionLost("the answer ended early");
}

/**
 * @param {ImageRequest} request
 * @param {number} numPreviews
 * @param {AbortSignal} signal
 * @param {Record<string, string|boolean>} others
 * @returns {Promise<Response>}
 */
function send(request, numPreviews, signal, others) {
  const fields = {
    ...settingsOf(request),
    output_format: "png",
    stream: true,
    progress: true,
    partial_images: numPreviews,
    all_candidates: true,
    ...others,
  };
  if (request.kind === "new") {
    // The seed is inserted as digits: JSON.stringify has no way to write a whole number of 64 bits.
    const json = `${JSON.stringify(fields).slice(0, -1)},"seed":${BigInt(request.seed)}}`;
    return call("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: json,
      signal,
    });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries({ ...fields, seed: request.seed })) form.set(name, String(value));
  if (request.image) form.set("image", request.image, "image.png");
  if (request.mask) form.set("mask", request.mask, "mask.png");
  return call("v1/images/edits", { method: "POST", body: form, signal });
}

/**
 * @param {ImageRequest} request
 * @returns {Record<string, string|number>} what determines the images, by the API's names, without the seed
 */
export function settingsOf(request) {
  const fields = {
    prompt: request.caption,
    n: request.n,
    candidates: request.candidates,
    temperature: request.temperature,
    guidance: request.guidance,
    top_k: request.topK,
    top_p: request.topP,
    keep_rows: request.kind === "rows" ? request.keepRows : null,
    strength: request.strength ?? null,
    changed_from: request.changedFrom ?? null,
  };
  return /** @type {Record<string, string|number>} */ (
    Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null))
  );
}

/**
 * @typedef {{reset: () => void, stop: () => void}} Watchdog
 *
 * @param {() => void} onTimeout called once when it was not reset for so long
 * @param {number} seconds
 * @returns {Watchdog}
 */
function startWatchdog(onTimeout, seconds) {
  let timer = setTimeout(onTimeout, seconds * 1000);
  return {
    reset: () => {
      clearTimeout(timer);
      timer = setTimeout(onTimeout, seconds * 1000);
    },
    stop: () => clearTimeout(timer),
  };
}

/**
 * @param {ReadableStream<Uint8Array>} stream
 * @param {Watchdog} watchdog reset with each chunk
 * @returns {ReadableStream<Uint8Array>}
 */
function watched(stream, watchdog) {
  /**
   * @param {Uint8Array} chunk
   * @param {TransformStreamDefaultController<Uint8Array>} controller
   */
  const transform = (chunk, controller) => {
    watchdog.reset();
    controller.enqueue(chunk);
  };
  return stream.pipeThrough(new TransformStream({ transform }));
}

/**
 * @param {string} base64
 * @param {string} format "png", "webp" or "jpeg"
 * @returns {Blob}
 */
export function blobOf(base64, format = "png") {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  return new Blob([bytes], { type: `image/${format}` });
}
