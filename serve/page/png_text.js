/**
 * Texts inside PNG files: international text chunks (iTXt; PNG specification, third edition, 11.3.3.4), as the engine writes
 * them (engine/pipeline/image_encoding.py): an image's provenance, and the mark that it was made by AI.
 */

import { crc32 } from "./crc32.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const AFTER_HEADER = 8 + 25; // signature and IHDR, which is always first
const MOST_CHUNKS = 10_000;
/** Keyword of an image's provenance. */
export const PROVENANCE = "provenance";
/** Keyword of what a sheet shows. */
export const SHEET = "sheet";
/** Keyword of XMP, which says that the image was made by AI. */
export const XMP = "XML:com.adobe.xmp";

/**
 * @param {Uint8Array} file
 * @returns {Map<string, string>|null} texts by keyword, those that are not compressed; null where it is no PNG
 */
export function readTexts(file) {
  if (!SIGNATURE.every((byte, index) => file[index] === byte)) return null;
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  /** @type {Map<string, string>} */
  const texts = new Map();
  let at = SIGNATURE.length;
  for (let number = 0; number < MOST_CHUNKS && at + 12 <= file.length; number++) {
    const length = view.getUint32(at);
    const data = file.subarray(at + 8, at + 8 + length);
    if (data.length < length) break; // cut off
    if (new TextDecoder().decode(file.subarray(at + 4, at + 8)) === "iTXt") readText(data, texts);
    at += 12 + length;
  }
  return texts;
}

/**
 * Keyword, 0, compressed?, method, language, 0, translated keyword, 0, text.
 * @param {Uint8Array} data
 * @param {Map<string, string>} texts
 */
function readText(data, texts) {
  const end = data.indexOf(0);
  const afterLanguage = data.indexOf(0, end + 3);
  const afterTranslated = data.indexOf(0, afterLanguage + 1);
  if (end < 1 || afterLanguage < 0 || afterTranslated < 0 || data[end + 1] !== 0) return;
  const decoder = new TextDecoder();
  texts.set(decoder.decode(data.subarray(0, end)), decoder.decode(data.subarray(afterTranslated + 1)));
}

/**
 * @param {Uint8Array} file a PNG
 * @param {Map<string, string>} texts by keyword
 * @returns {Uint8Array<ArrayBuffer>} the same with these texts
 */
export function withTexts(file, texts) {
  const chunks = [...texts].map(([keyword, text]) => {
    const data = new TextEncoder().encode(`${keyword}\0\0\0\0\0${text}`);
    const chunk = new Uint8Array(12 + data.length);
    const view = new DataView(chunk.buffer);
    view.setUint32(0, data.length);
    chunk.set(new TextEncoder().encode("iTXt"), 4);
    chunk.set(data, 8);
    view.setUint32(8 + data.length, crc32(chunk.subarray(4, 8 + data.length)));
    return chunk;
  });
  const parts = [file.subarray(0, AFTER_HEADER), ...chunks, file.subarray(AFTER_HEADER)];
  const made = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  parts.reduce((at, part) => (made.set(part, at), at + part.length), 0);
  return made;
}

/**
 * @param {string[]} packets XMP of images
 * @returns {string} what holds for all of them: one that is a composite makes the sheet one
 */
export function commonMark(packets) {
  return packets.find((xmp) => xmp.includes("compositeWith")) ?? packets.find(Boolean) ?? "";
}
