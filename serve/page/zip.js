/**
 * ZIP archives of files that are compressed already: stored as they are, with a table of contents.
 *
 * Source: PKWARE's APPNOTE.TXT 6.3.10, 4.3 (without encryption, data descriptors and ZIP64: below 4 GiB and 65,536 files).
 */

import { crc32 } from "./crc32.js";

const UTF8_NAMES = 0x0800;
const VERSION = 20;
const MOST_BYTES = 2 ** 32 - 1;

/**
 * @param {{name: string, content: Blob, modifiedMs: number}[]} files
 * @returns {Promise<Blob>}
 * @throws {RangeError} for more than the format holds
 */
export async function zipOf(files) {
  const parts = [];
  const contents = [];
  let offset = 0;
  for (const { name, content, modifiedMs } of files) {
    const bytes = new Uint8Array(await content.arrayBuffer());
    const encoded = new TextEncoder().encode(name);
    const common = [
      ...[u16(VERSION), u16(UTF8_NAMES), u16(0), dosTime(modifiedMs)],
      ...[u32(crc32(bytes)), u32(bytes.length), u32(bytes.length), u16(encoded.length), u16(0)],
    ];
    const local = joined([u32(0x04034b50), ...common, encoded]);
    // comment, disk, internal and external attributes, and where the file begins
    contents.push(joined([u32(0x02014b50), u16(VERSION), ...common, u16(0), u16(0), u16(0), u32(0), u32(offset), encoded]));
    parts.push(local, content);
    offset += local.length + bytes.length;
  }
  const length = contents.reduce((sum, each) => sum + each.length, 0);
  if (offset + length > MOST_BYTES || files.length > 0xffff) throw new RangeError("too large for a ZIP archive");
  const count = u16(files.length);
  const end = joined([u32(0x06054b50), u16(0), u16(0), count, count, u32(length), u32(offset), u16(0)]);
  return new Blob([...parts, ...contents, end], { type: "application/zip" });
}

/**
 * @param {number} milliseconds since 1970
 * @returns {Uint8Array<ArrayBuffer>} local time and date, to two seconds
 */
function dosTime(milliseconds) {
  const at = new Date(milliseconds);
  const time = (at.getHours() << 11) | (at.getMinutes() << 5) | (at.getSeconds() >> 1);
  const date = ((at.getFullYear() - 1980) << 9) | ((at.getMonth() + 1) << 5) | at.getDate();
  return joined([u16(time), u16(date)]);
}

/** @param {number} value */
function u16(value) {
  return Uint8Array.of(value & 0xff, value >>> 8);
}

/** @param {number} value */
function u32(value) {
  return Uint8Array.of(value & 0xff, (value >>> 8) & 0xff, (value >>> 16) & 0xff, value >>> 24);
}

/**
 * @param {Uint8Array[]} parts
 * @returns {Uint8Array<ArrayBuffer>}
 */
function joined(parts) {
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}
