/**
 * Sheets: many images requested at once, of one caption over the values of one or two attributes, or of a list of captions.
 *
 * Every request of a sheet carries what the sheet is and which cell it fills. So a sheet survives a reload, and can be put
 * together again from what is stored, by any one of its cells. Plain functions of values: no element is touched here.
 */

import { withValue } from "./composer.js";

/** As many images as a sheet may have: more would keep a small server busy for an hour, and no eye compares them. */
export const MOST_CELLS = 120;

/**
 * @typedef {import("./composer.js").Grammar} Grammar
 * @typedef {{subject: string, attribute: string, values: string[]}} Axis an attribute, and its values from left to right
 *   or from top to bottom
 *
 * What a request says of its sheet.
 * @typedef {object} SheetPlace
 * @property {string} id of the sheet; sorts by time, as its generations do
 * @property {string} caption that it varies; "" for a list
 * @property {Axis[]} axes one, or rows and columns; none for a list, whose rows are captions
 * @property {number} numCells
 * @property {number} cell number of this one, row by row
 */

/**
 * @param {Grammar} grammar
 * @param {string} caption
 * @param {Axis[]} axes
 * @returns {string[]} the caption of every cell, row by row
 */
export function captionsOf(grammar, caption, axes) {
  return axes.reduce(
    (captions, { subject, attribute, values }) => {
      const isList = grammar.form.attributes.find(({ name }) => name === attribute)?.control === "several";
      return captions.flatMap((each) =>
        values.map((value) => withValue(grammar, each, { subject, attribute, value: isList ? [value] : value })),
      );
    },
    [caption],
  );
}

/**
 * @param {string} text
 * @returns {{line: number, caption: string}[]} its lines that are not empty, each as it is sent, numbered from 1
 */
export function linesOf(text) {
  return text
    .split(/\r\n|\r|\n/u)
    .map((line, index) => ({ line: index + 1, caption: line.normalize("NFC").replace(/\s+/gu, " ").trim() }))
    .filter(({ caption }) => caption);
}

/**
 * @param {SheetPlace} place
 * @param {number} cell
 * @returns {string[]} the value of each attribute in this cell
 */
export function valuesOf({ axes }, cell) {
  const [rows, columns] = axes;
  if (!columns) return rows ? [rows.values[cell]] : [];
  return [rows.values[Math.floor(cell / columns.values.length)], columns.values[cell % columns.values.length]];
}

/**
 * @param {number} numCells
 * @returns {number} cells side by side where one attribute fills several lines
 */
export function columnsFor(numCells) {
  return Math.min(6, Math.max(1, Math.ceil(Math.sqrt(numCells))));
}
