/**
 * The settings of a drawing: read, checked and written back, one place for their names, limits and first values.
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
 */

/**
 * What the form begins with; of how to draw, what the model says as soon as it is known.
 * @type {Settings}
 */
export const FIRST = { n: 4, candidates: 16, seed: "", temperature: 1, guidance: 1, topK: null, topP: null };
const INPUTS = {
  n: "n",
  candidates: "candidates",
  seed: "seed",
  temperature: "temperature",
  guidance: "guidance",
  topK: "top_k",
  topP: "top_p",
};
const LIMITS = {
  n: [1, 10],
  candidates: [1, 64],
  temperature: [0, 10],
  guidance: [0, 20],
  topK: [1, 1_000_000],
  topP: [0, 1],
};
// As good as no filter: what an empty field means where the model would filter of itself.
const ALL = { topK: LIMITS.topK[1], topP: 1 };
const WHOLE = ["n", "candidates", "topK"];
const MOST_SEED = 2n ** 64n;
const DRAFT = "kodalle.settings";

/** Whether FIRST is the model's: until then nobody can tell a choice from a value that came with the page. */
let isSettled = false;

/** A setting that cannot be drawn with; `field` says which. */
export class SettingFault extends Error {
  /**
   * @param {string} field
   * @param {string} message
   */
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/**
 * @returns {Settings}
 * @throws {SettingFault} the first that does not fit
 */
export function readSettings() {
  const settings = { ...FIRST };
  for (const name of Object.keys(LIMITS)) settings[name] = readNumber(name);
  settings.seed = input("seed").value.trim();
  if (settings.seed && !(/^\d{1,20}$/u.test(settings.seed) && BigInt(settings.seed) < MOST_SEED)) {
    throw new SettingFault("seed", t("settings.bad_seed"));
  }
  if (settings.candidates < settings.n) throw new SettingFault("candidates", t("settings.too_few", { n: settings.n }));
  return settings;
}

/**
 * @param {Partial<Settings>} settings those named are written
 */
export function writeSettings(settings) {
  for (const [name, value] of Object.entries(settings)) {
    if (name in INPUTS) input(name).value = textOf(value);
  }
  changed();
}

/**
 * @returns {string} a seed for "", 52 bits: short enough to read out
 */
export function randomSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return ((BigInt(high & 0xfffff) << 32n) | BigInt(low)).toString();
}

/**
 * @param {SettingFault|null} fault shown beneath the settings and told at its field
 */
export function showSettingFault(fault) {
  const place = byId("settings-fault");
  place.hidden = fault === null;
  place.textContent = fault?.message ?? "";
  for (const name of Object.keys(INPUTS)) input(name).setAttribute("aria-invalid", String(fault?.field === name));
  if (!fault) return;
  if (["temperature", "guidance", "topK", "topP"].includes(fault.field)) byId("advanced").setAttribute("open", "");
  input(fault.field).focus();
}

/** Makes the form's steppers and buttons work, and brings back what it held. */
export function startSettings() {
  for (const stepper of document.querySelectorAll("button[data-step]")) {
    stepper.addEventListener("click", () => {
      const field = /** @type {HTMLInputElement} */ (byId(stepper.getAttribute("data-for")));
      if (stepper.getAttribute("data-step") === "1") field.stepUp();
      else field.stepDown();
      changed();
    });
  }
  for (const name of Object.keys(INPUTS)) input(name).addEventListener("input", changed);
  byId("to-settings").addEventListener("click", () => {
    byId("settings").scrollIntoView({ block: "center" });
    input("n").focus({ preventScroll: true });
  });
  byId("seed-clear").addEventListener("click", () => writeSettings({ seed: "" }));
  byId("settings-reset").addEventListener("click", () => {
    const { temperature, guidance, topK, topP } = FIRST;
    writeSettings({ temperature, guidance, topK, topP });
  });
  for (const [name, value] of Object.entries(draft())) if (name in INPUTS) input(name).value = String(value);
  onLanguage(changed);
}

/**
 * What the server draws at most, and how when nobody says.
 * @param {import("./api.js").Model} model
 */
export function limitSettings({ limits, default_candidates, default_sampling_params }) {
  LIMITS.n[1] = limits.images;
  LIMITS.candidates[1] = limits.candidates;
  input("n").max = String(limits.images);
  input("candidates").max = String(limits.candidates);
  const { temperature, guidance_scale, top_k, top_p } = default_sampling_params;
  const told = { candidates: default_candidates, temperature, guidance: guidance_scale, topK: top_k, topP: top_p };
  // As they came with the page: nobody has chosen them.
  const untouched = Object.keys(told).filter((name) => input(name).value === textOf(FIRST[name]) && !(name in draft()));
  Object.assign(FIRST, told);
  isSettled = true;
  writeSettings(Object.fromEntries(untouched.map((name) => [name, told[name]])));
}

/**
 * @returns {Record<string, string>} what an earlier visit chose; {} where that is not ours, or half written
 */
function draft() {
  try {
    return Object(JSON.parse(kept(lasting(), DRAFT) || "{}"));
  } catch {
    return {};
  }
}

/** What follows from any change: kept for the next visit, faults taken back, the fold's summary told. */
function changed() {
  showSettingFault(null);
  const values = Object.fromEntries(Object.keys(INPUTS).map((name) => [name, input(name).value]));
  const before = isSettled ? {} : draft();
  const chosen = Object.entries(values).filter(([name, value]) => value !== textOf(FIRST[name]) || name in before);
  keep(lasting(), DRAFT, JSON.stringify(Object.fromEntries(chosen)));
  byId("seed-clear").toggleAttribute("disabled", values.seed === "");
  const summary = t("compose.settings", {
    n: Number(values.n),
    candidates: Number(values.candidates),
    seed: values.seed || t("compose.random"),
  });
  byId("to-settings").textContent = summary;
  byId("to-settings").setAttribute("aria-label", t("compose.to_settings", { told: summary }));
  // Above the fold it must show that something behind it is not as it was.
  const told = ["temperature", "guidance", "topK", "topP"]
    .filter((name) => values[name] !== textOf(FIRST[name]))
    .map(
      (name) =>
        `${t(`settings.${name}_short`)} ${Number.isFinite(Number(values[name])) ? formatNumber(Number(values[name])) : values[name]}`,
    );
  byId("advanced-summary").textContent = told.join(" · ");
}

/**
 * @param {string} name
 * @returns {number|null}
 */
function readNumber(name) {
  const field = input(name);
  const text = field.value.trim();
  if (text === "" && name in ALL && field.validity.valid) return FIRST[name] === null ? null : ALL[name];
  const [least, most] = LIMITS[name];
  const value = Number(text);
  const isFine = text !== "" && value >= least && value <= most && (!WHOLE.includes(name) || Number.isInteger(value));
  if (!isFine || (name === "topP" && value === 0)) {
    throw new SettingFault(name, t("settings.bad_number", { name: t(`settings.${name}_short`), least, most }));
  }
  return value;
}

/**
 * @param {number|string|null} value
 * @returns {string} as it stands in a field
 */
function textOf(value) {
  return value === null ? "" : String(value);
}

/**
 * @param {string} name
 * @returns {HTMLInputElement}
 */
function input(name) {
  return /** @type {HTMLInputElement} */ (byId(INPUTS[name]));
}
