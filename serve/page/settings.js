/**
 * The form's settings: read, checked and written back. Bounds and defaults are the served model's.
 */

import { byId } from "./elements.js";
import { keep, kept, lasting } from "./preferences.js";
import { formatNumber, onLanguage, t } from "./texts.js";

/**
 * @typedef {object} Settings
 * @property {number} n
 * @property {number} candidates
 * @property {string} seed "" for a random one
 * @property {number} temperature
 * @property {number} guidance
 * @property {number|null} topK
 * @property {number|null} topP
 *
 * @typedef {keyof Settings} Name
 * @typedef {Exclude<Name, "seed">} NumberName
 * @typedef {{minimum: number, maximum: number, or_zero: boolean, type: "integer"|"number"}} Bounds
 */

/**
 * What an untouched form holds; the model's defaults as soon as they are known.
 * @type {Settings}
 */
const defaults = { n: 4, candidates: 16, seed: "", temperature: 1, guidance: 1, topK: null, topP: null };
/** @type {Record<Name, string>} names in an API request, in links and in copied settings; ids of the inputs, too */
export const REQUEST_NAMES = {
  n: "n",
  candidates: "candidates",
  seed: "seed",
  temperature: "temperature",
  guidance: "guidance",
  topK: "top_k",
  topP: "top_p",
};
const NAMES = /** @type {Name[]} */ (Object.keys(REQUEST_NAMES));
/** @type {Record<NumberName, keyof import("./api.js").Model["sampling_params"]>} names in the model's card */
const CARD_NAMES = {
  n: "n",
  candidates: "candidates",
  temperature: "temperature",
  guidance: "guidance_scale",
  topK: "top_k",
  topP: "top_p",
};
const NUMBER_NAMES = /** @type {NumberName[]} */ (Object.keys(CARD_NAMES));
const ADVANCED = /** @type {const} */ (["temperature", "guidance", "topK", "topP"]);
const SEED_END = 2n ** 64n; // not the API's number: JavaScript's would round it
const DRAFT = "kodalle.settings";

/** @type {Partial<Record<NumberName, Bounds>>} of the served model, once it is known */
let bounds = {};

/** A setting out of bounds; `field` says which. */
export class SettingFault extends Error {
  /**
   * @param {Name} field
   * @param {string} message
   */
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/**
 * @param {number|null} [n] images shown, where the form does not decide it
 * @returns {Settings}
 * @throws {SettingFault} the first that is out of bounds
 */
export function readSettings(n = null) {
  const seed = checkedText("seed", input("seed").value);
  const settings = {
    n: n ?? readNumber("n"),
    candidates: readNumber("candidates"),
    seed,
    temperature: readNumber("temperature"),
    guidance: readNumber("guidance"),
    topK: readFilter("topK"),
    topP: readFilter("topP"),
  };
  if (settings.candidates < settings.n) throw new SettingFault("candidates", t("settings.too_few", { n: settings.n }));
  return settings;
}

/**
 * @param {Name} name
 * @param {string} text as it would be typed
 * @returns {string} the same without spaces around it
 * @throws {SettingFault} out of bounds, or no number
 */
export function checkedText(name, text) {
  const trimmed = text.trim();
  if (name !== "seed") return trimmed === "" && (name === "topK" || name === "topP") ? "" : String(numberOf(name, trimmed));
  if (trimmed && !(/^\d{1,20}$/u.test(trimmed) && BigInt(trimmed) < SEED_END))
    throw new SettingFault("seed", t("settings.bad_seed"));
  return trimmed;
}

/**
 * @param {Partial<Record<Name, string>>} texts as `checkedText` returns them
 * @param {boolean} isWhole whether the others become the model's defaults
 */
export function takeSettings(texts, isWhole) {
  for (const name of NAMES) {
    const own = isWhole ? textOf(defaults[name]) : input(name).value;
    input(name).value = texts[name] ?? own;
  }
  // More candidates than the file names are no fault: the image that it is of is among them.
  if (!isWhole && Number(input("candidates").value) < Number(input("n").value)) input("candidates").value = input("n").value;
  changed();
}

/**
 * @param {Partial<Settings>} settings those named are written
 */
export function writeSettings(settings) {
  for (const name of NAMES) if (name in settings) input(name).value = textOf(settings[name] ?? null);
  changed();
}

/**
 * @returns {string} 52 random bits: short enough to read out
 */
export function randomSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return ((BigInt(high & 0xfffff) << 32n) | BigInt(low)).toString();
}

/**
 * @param {SettingFault|null} fault shown beneath the settings, its field marked
 */
export function showSettingFault(fault) {
  const place = byId("settings-fault");
  place.hidden = fault === null;
  place.textContent = fault?.message ?? "";
  for (const name of NAMES) input(name).setAttribute("aria-invalid", String(fault?.field === name));
  if (!fault) return;
  if (ADVANCED.some((name) => name === fault.field)) byId("advanced").setAttribute("open", "");
  const field = input(fault.field);
  endOfRow(/** @type {HTMLElement} */ (field.closest(".field"))).after(place);
  place.scrollIntoView({ block: "nearest" });
  field.focus();
}

/**
 * @param {HTMLElement} field
 * @returns {HTMLElement} the last one beside it, after which a message stands beneath both
 */
function endOfRow(field) {
  const next = field.nextElementSibling;
  return next instanceof HTMLElement && next.matches(".field") && next.offsetTop === field.offsetTop ? next : field;
}

/** Makes the form's steppers and buttons work, and restores what it held. */
export function startSettings() {
  for (const stepper of document.querySelectorAll("button[data-step]")) {
    stepper.addEventListener("click", () => {
      const field = /** @type {HTMLInputElement} */ (byId(stepper.getAttribute("data-for") ?? ""));
      if (stepper.getAttribute("data-step") === "1") field.stepUp();
      else field.stepDown();
      changed();
    });
  }
  for (const name of NAMES) input(name).addEventListener("input", changed);
  byId("to-settings").addEventListener("click", () => {
    byId("settings").scrollIntoView({ block: "center" });
    input("n").focus({ preventScroll: true });
  });
  byId("seed-clear").addEventListener("click", () => writeSettings({ seed: "" }));
  byId("settings-reset").addEventListener("click", () => {
    const { temperature, guidance, topK, topP } = defaults;
    writeSettings({ temperature, guidance, topK, topP });
  });
  const restored = draft();
  for (const name of NAMES) if (name in restored) input(name).value = String(restored[name]);
  onLanguage(changed);
}

/**
 * Takes over the served model's bounds and defaults.
 * @param {import("./api.js").Model} model
 */
export function limitSettings({ sampling_params, default_candidates, default_sampling_params }) {
  bounds = Object.fromEntries(NUMBER_NAMES.map((name) => [name, sampling_params[CARD_NAMES[name]]]));
  for (const name of NUMBER_NAMES) {
    const { minimum, maximum, or_zero } = sampling_params[CARD_NAMES[name]];
    // From a whole number, so that arrow keys step through round values; readNumber checks the bound itself.
    Object.assign(input(name), { min: String(or_zero ? 0 : Math.floor(minimum)), max: String(maximum) });
  }
  const { temperature, guidance_scale, top_k, top_p } = default_sampling_params;
  const model = {
    n: Math.min(defaults.n, sampling_params.n.maximum),
    candidates: default_candidates,
    temperature,
    guidance: guidance_scale,
    topK: top_k,
    topP: top_p,
  };
  const names = /** @type {(keyof typeof model)[]} */ (Object.keys(model));
  // Values that still are the page's and not the user's.
  const untouched = names.filter((name) => input(name).value === textOf(defaults[name]) && !(name in draft()));
  Object.assign(defaults, model);
  writeSettings(Object.fromEntries(untouched.map((name) => [name, model[name]])));
}

/**
 * @returns {Record<string, string>} what an earlier visit chose; {} where that cannot be read
 */
function draft() {
  try {
    return Object(JSON.parse(kept(lasting(), DRAFT) || "{}"));
  } catch {
    return {};
  }
}

/** What follows from any change: it is kept for the next visit, faults and summaries are shown anew. */
function changed() {
  showSettingFault(null);
  const values = /** @type {Record<Name, string>} */ (
    Object.fromEntries(NAMES.map((name) => [name, input(name).value]))
  );
  // Until the model's defaults are known, a default cannot be distinguished from a choice: what was kept stays kept.
  const before = "n" in bounds ? {} : draft();
  const chosen = NAMES.filter((name) => values[name] !== textOf(defaults[name]) || name in before);
  keep(lasting(), DRAFT, JSON.stringify(Object.fromEntries(chosen.map((name) => [name, values[name]]))));
  byId("seed-clear").toggleAttribute("disabled", values.seed === "");
  const summary = t("compose.settings", {
    n: Number(values.n),
    candidates: Number(values.candidates),
    seed: values.seed || t("compose.random"),
  });
  byId("to-settings").textContent = summary;
  byId("to-settings").setAttribute("aria-label", t("compose.to_settings", { summary }));
  // The closed fold must show which settings in it are not the defaults.
  const differing = ADVANCED.filter((name) => values[name] !== textOf(defaults[name])).map((name) => {
    const number = Number(values[name]);
    return `${t(`settings.${name}_short`)} ${Number.isFinite(number) ? formatNumber(number) : values[name]}`;
  });
  byId("advanced-summary").textContent = differing.join(" · ");
}

/**
 * @param {NumberName} name
 * @returns {number}
 */
function readNumber(name) {
  return numberOf(name, input(name).value.trim());
}

/**
 * @param {NumberName} name
 * @param {string} text
 * @returns {number}
 */
function numberOf(name, text) {
  const value = Number(text);
  const limits = bounds[name];
  if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/iu.test(text) || !Number.isFinite(value)) throw badNumber(name);
  if (!limits) return value; // the server checks it
  const isWithin = (value >= limits.minimum && value <= limits.maximum) || (limits.or_zero && value === 0);
  if (!isWithin || (limits.type === "integer" && !Number.isInteger(value))) throw badNumber(name);
  return value;
}

/**
 * @param {"topK"|"topP"} name
 * @returns {number|null} for an empty field null, or the widest filter where the model has one of its own
 */
function readFilter(name) {
  const field = input(name);
  if (field.value.trim() !== "" || !field.validity.valid) return readNumber(name);
  return defaults[name] === null ? null : (bounds[name]?.maximum ?? null);
}

/**
 * @param {NumberName} name
 * @returns {SettingFault}
 */
function badNumber(name) {
  const { minimum = 0, maximum = Infinity, or_zero, type } = bounds[name] ?? {};
  const key = type === "integer" ? "bad_whole_number" : or_zero ? "bad_number_or_zero" : "bad_number";
  const span = { least: formatNumber(minimum, 6), most: formatNumber(maximum, 6) };
  return new SettingFault(name, t(`settings.${key}`, { name: t(`settings.${name}_short`), ...span }));
}

/**
 * @param {number|string|null} value
 * @returns {string} as it stands in a field
 */
function textOf(value) {
  return value === null ? "" : String(value);
}

/**
 * @param {Name} name
 * @returns {HTMLInputElement}
 */
function input(name) {
  return /** @type {HTMLInputElement} */ (byId(REQUEST_NAMES[name]));
}
