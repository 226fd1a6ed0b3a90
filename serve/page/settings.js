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

/** @type {Settings} */
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
const WHOLE = ["n", "candidates", "topK"];
const MOST_SEED = 2n ** 64n;
const DRAFT = "kodalle.settings";

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
    if (name in INPUTS) input(name).value = value === null ? "" : String(value);
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
  try {
    const draft = JSON.parse(kept(lasting(), DRAFT) || "{}");
    for (const [name, value] of Object.entries(draft)) if (name in INPUTS) input(name).value = String(value);
  } catch {
    // Not ours, or half written: the form keeps its first values.
  }
  onLanguage(changed);
}

/**
 * What the server draws at most, and how many candidates when nobody says.
 * @param {{images: number, candidates: number}} limits
 * @param {number} candidates
 */
export function limitSettings(limits, candidates) {
  LIMITS.n[1] = limits.images;
  LIMITS.candidates[1] = limits.candidates;
  input("n").max = String(limits.images);
  input("candidates").max = String(limits.candidates);
  // As it came with the page: nobody has chosen it.
  if (input("candidates").value === String(FIRST.candidates)) input("candidates").value = String(candidates);
}

/** What follows from any change: kept for the next visit, faults taken back, the fold's summary told. */
function changed() {
  showSettingFault(null);
  const values = Object.fromEntries(Object.keys(INPUTS).map((name) => [name, input(name).value]));
  keep(lasting(), DRAFT, JSON.stringify(values));
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
    .filter((name) => values[name] !== (FIRST[name] === null ? "" : String(FIRST[name])))
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
  if (text === "" && FIRST[name] === null && field.validity.valid) return null;
  const [least, most] = LIMITS[name];
  const value = Number(text);
  const isFine = text !== "" && value >= least && value <= most && (!WHOLE.includes(name) || Number.isInteger(value));
  if (!isFine || (name === "topP" && value === 0)) {
    throw new SettingFault(name, t("settings.bad_number", { name: t(`settings.${name}_short`), least, most }));
  }
  return value;
}

/**
 * @param {string} name
 * @returns {HTMLInputElement}
 */
function input(name) {
  return /** @type {HTMLInputElement} */ (byId(INPUTS[name]));
}
