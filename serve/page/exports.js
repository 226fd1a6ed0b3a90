/**
 * Several images in one file: a ZIP of the same files that are downloaded one by one, with a table of what made them, or a
 * contact sheet to print. Made here and not by the server, which has no gallery: what is in it stays in this browser.
 */

import { contactSheet } from "./contact_sheet.js";
import { saveFile } from "./library.js";
import { formatTime, t } from "./texts.js";
import { zipOf } from "./zip.js";

/** @typedef {import("./library.js").Picture} Picture */

/** @param {Picture[]} pictures */
export async function savePdf(pictures) {
  saveFile(await contactSheet(pictures), `kodalle-${today()}.pdf`);
}

/** @param {Picture[]} pictures */
export async function saveZip(pictures) {
  const digits = String(pictures.length).length;
  const files = pictures.map(({ generation, image }, index) => ({
    // Numbered: a seed and a candidate may occur with several captions.
    name: `${String(index + 1).padStart(digits, "0")}-kodalle-${generation.request.seed}-${image.candidate}.png`,
    content: image.blob,
    modifiedMs: generation.createdMs,
  }));
  const table = tableOf(pictures, files.map(({ name }) => name));
  const content = new Blob([table], { type: "text/csv" });
  saveFile(await zipOf([...files, { name: "images.csv", content, modifiedMs: Date.now() }]), `kodalle-${today()}.zip`);
}

/**
 * @param {Picture[]} pictures
 * @param {string[]} names of their files
 * @returns {string} CSV, with the mark by which spreadsheets know that it is UTF-8
 */
function tableOf(pictures, names) {
  const head = ["file", "caption", "seed", "candidate", "rank", "clip_score", "model", "model_digest", "made", "source"];
  const rows = pictures.map(({ generation, image }, index) => {
    const { request, modelId, modelDigest, createdMs } = generation;
    const { candidate, rank, score } = image;
    const values = [request.caption, request.seed, candidate, rank, score ?? "", modelId, modelDigest, formatTime(createdMs)];
    return [names[index], ...values, t("contact.ai")];
  });
  return `\ufeff${[head, ...rows].map((row) => row.map(cellOf).join(",")).join("\r\n")}\r\n`;
}

/**
 * @param {string|number} value
 * @returns {string} quoted; what a spreadsheet would take for a formula has an apostrophe before it
 */
function cellOf(value) {
  const text = String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/u.test(text) ? `'${text}` : text;
  return `"${safe.replaceAll('"', '""')}"`;
}

/** @returns {string} such as 20261130 */
function today() {
  const at = new Date();
  const two = (/** @type {number} */ value) => String(value).padStart(2, "0");
  return `${at.getFullYear()}${two(at.getMonth() + 1)}${two(at.getDate())}`;
}
