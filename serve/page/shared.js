/**
 * Caption and settings that come from elsewhere: a link, a settings file, or an image of this page. They fill the form, and
 * nothing is generated before its user wants it.
 *
 * The values are anyone's: each is checked as if it had been typed, and one that the form would refuse is not taken over.
 */

import { copyText } from "./clipboard.js";
import { button, showBriefly } from "./elements.js";
import { servedModel } from "./model.js";
import { PROVENANCE, SHEET, readTexts } from "./png_text.js";
import { REQUEST_NAMES, SettingFault, checkedText, showSettingFault, takeSettings } from "./settings.js";
import { t } from "./texts.js";

const MOST_JSON_BYTES = 2 ** 20;
const MOST_PNG_BYTES = 60 * 2 ** 20;

/**
 * @typedef {import("./settings.js").Name} Name
 * @typedef {Partial<Record<Name, string>>} Texts settings as they would be typed
 *
 * @typedef {object} Shared
 * @property {string} caption
 * @property {Texts} settings
 * @property {boolean} isWhole whether settings that it leaves out are the model's defaults; else they stay as they are
 * @property {string} remark on what it cannot bring back; "" for nothing
 */

/**
 * @param {import("./api.js").ImageRequest} request without an init image: a link cannot carry one
 * @returns {string} the address of this page with its caption and settings
 */
export function linkOf(request) {
  const fields = new URLSearchParams({ prompt: request.caption });
  for (const [name, apiName] of /** @type {[Name, string][]} */ (Object.entries(REQUEST_NAMES))) {
    const value = request[name];
    if (value !== null) fields.set(apiName, String(value));
  }
  return `${window.location.href.split("#")[0]}#${fields}`;
}

/**
 * @param {import("./api.js").ImageRequest} request
 * @param {HTMLElement} [root] the open dialog, if there is one
 * @returns {HTMLElement|null} a button that copies the link; null where a link cannot carry all of it
 */
export function linkButton(request, root) {
  if (request.kind !== "new") return null;
  const copy = async () => {
    showBriefly(t((await copyText(linkOf(request), root)) ? "shared.copied" : "viewer.not_copied"));
  };
  return button({ icon: "link", text: t("shared.copy"), press: copy, action: "link" });
}

/**
 * @param {string} hash of an address
 * @returns {Shared|null} null where it is no link to a caption
 */
export function sharedInLink(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/u, ""));
  const caption = fields.get("prompt");
  return caption === null ? null : { caption, settings: textsOf(Object.fromEntries(fields)), isWhole: true, remark: "" };
}

/**
 * @param {File} file
 * @returns {Promise<Shared|null>} null for a file without caption and settings
 */
export async function sharedInFile(file) {
  const isJson = file.type === "application/json" || /\.json$/iu.test(file.name);
  if (isJson) return file.size > MOST_JSON_BYTES ? null : sharedInJson(await file.text());
  if (file.size > MOST_PNG_BYTES) return null;
  const texts = readTexts(new Uint8Array(await file.arrayBuffer()));
  return sharedInJson(texts?.get(PROVENANCE) ?? texts?.get(SHEET) ?? "");
}

/**
 * The viewer's settings, an image's provenance, or what a sheet shows.
 * @param {string} text
 * @returns {Shared|null}
 */
function sharedInJson(text) {
  const tree = parsed(text);
  if (tree === null) return null;
  const [first] = Array.isArray(tree.images) ? tree.images : [];
  const made = recordOf(first)?.provenance;
  if (made) return sharedInProvenance(recordOf(made), typeof tree.caption === "string" ? tree.caption : "");
  if (tree.sampling_params) return sharedInProvenance(tree, "");
  const caption = tree.prompt;
  if (typeof caption !== "string") return null;
  const remark = typeof tree.keep_rows === "number" ? t("shared.needs_image") : "";
  return { caption, settings: textsOf(tree), isWhole: true, remark };
}

/**
 * @param {Record<string, unknown>|null} made
 * @param {string} caption of its sheet
 * @returns {Shared|null}
 */
function sharedInProvenance(made, caption) {
  const params = recordOf(made?.sampling_params);
  if (!made || !params || typeof made.caption !== "string") return null;
  const settings = textsOf({ ...params, guidance: params.guidance_scale, seed: made.seed });
  const candidate = Number(made.candidate);
  // Image number 5 of a seed takes six candidates; how many there were, and how many were shown, the file does not say.
  if (Number.isInteger(candidate) && candidate > 0) settings.candidates = String(candidate + 1);
  const model = servedModel();
  const isOther = model !== null && typeof made.model_digest === "string" && made.model_digest !== model.digest;
  const remarks = [isOther ? t("shared.other_model") : "", made.init_image ? t("shared.needs_image") : ""];
  return { caption: caption || made.caption, settings, isWhole: false, remark: remarks.filter(Boolean).join(" ") };
}

/**
 * @param {string} text
 * @returns {Record<string, unknown>|null} null where it is no JSON object
 */
function parsed(text) {
  try {
    // A seed has more digits than a JavaScript number: it is read as text. In a JSON string the quotes would be escaped.
    return recordOf(JSON.parse(text.replace(/("seed"\s*:\s*)(\d+)/gu, '$1"$2"')));
  } catch {
    return null;
  }
}

/**
 * @param {unknown} value
 * @returns {Record<string, unknown>|null}
 */
function recordOf(value) {
  return typeof value === "object" && value !== null ? /** @type {Record<string, unknown>} */ (value) : null;
}

/**
 * @param {Record<string, unknown>} fields by the API's names
 * @returns {Texts} those that are settings; null counts as left out
 */
function textsOf(fields) {
  /** @type {Texts} */
  const texts = {};
  for (const [name, apiName] of /** @type {[Name, string][]} */ (Object.entries(REQUEST_NAMES))) {
    if (!Object.hasOwn(fields, apiName) || fields[apiName] === null || fields[apiName] === undefined) continue;
    const value = fields[apiName];
    texts[name] = typeof value === "string" || typeof value === "number" ? String(value) : "?";
  }
  return texts;
}

/**
 * Fills the form.
 * @param {Shared} shared
 * @param {import("./caption.js").CaptionBox} captionBox
 * @returns {boolean} whether all of it was taken over; a value that was not is reported at its field
 */
export function fillForm({ caption, settings, isWhole }, captionBox) {
  captionBox.write(caption);
  /** @type {SettingFault|null} */
  let fault = null;
  /** @type {Texts} */
  const taken = {};
  for (const [name, text] of /** @type {[Name, string][]} */ (Object.entries(settings))) {
    try {
      taken[name] = checkedText(name, text);
    } catch (error) {
      if (!(error instanceof SettingFault)) throw error;
      fault ??= error;
    }
  }
  takeSettings(taken, isWhole);
  if (fault) showSettingFault(fault);
  return fault === null && captionBox.fault() === null;
}

/**
 * Fills the form from the link by which the page was opened, now and whenever the address changes to one.
 * @param {import("./caption.js").CaptionBox} captionBox
 */
export function startLinks(captionBox) {
  const take = () => {
    const shared = sharedInLink(window.location.hash);
    if (!shared) return;
    // Or a reload would undo what is written from here on.
    window.history.replaceState(null, "", "#studio");
    if (fillForm(shared, captionBox)) showBriefly(t("shared.link"));
  };
  take();
  window.addEventListener("hashchange", take);
}
