/**
 * A sheet as one picture: its images with their labels, in a PNG that says how each was made, and that they are AI-made.
 */

import { showBriefly } from "./elements.js";
import { inLanguageShown, wordShown } from "./model.js";
import { PROVENANCE, SHEET, XMP, commonMark, readTexts, withTexts } from "./png_text.js";
import { columnsFor } from "./sheet.js";
import { formatNumber, t } from "./texts.js";

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./sheet.js").SheetPlace} SheetPlace
 *
 * @typedef {object} Plan where everything goes, in pixels
 * @property {number} width
 * @property {number} height
 * @property {{text: string, x: number, y: number, width: number, style: Style, isCentred?: boolean}[]} labels
 * @property {{blob: Blob, x: number, y: number}[]} images
 * @property {number} side of an image
 *
 * @typedef {"title"|"text"|"label"} Style
 */

// Phones refuse larger canvases.
const MOST_PIXELS = 16_000_000;
const LEAST_SIDE = 128;
const [MARGIN, GAP, LINE] = [24, 8, 22];
const LABEL_WIDTH = 120; // of rows in a table
const CAPTION_WIDTH = 320; // of rows in a list
const FONTS = { title: "700 20px", text: "14px", label: "700 14px" };

/**
 * Downloads it.
 * @param {string} title
 * @param {SheetPlace} place
 * @param {Generation[]} generations those of its cells that are done
 */
export async function saveSheet(title, place, generations) {
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await sheetPng(title, place, generations));
    link.download = `kodalle-sheet-${generations[0].request.seed}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    console.warn("no sheet could be made:", error);
    showBriefly(t("sheet.not_made"));
  }
}

/**
 * @param {string} title
 * @param {SheetPlace} place
 * @param {Generation[]} generations
 * @returns {Promise<Blob>}
 */
async function sheetPng(title, place, generations) {
  const first = await createImageBitmap(generations[0].images[0].blob);
  const plan = planOf(title, place, generations, Math.max(LEAST_SIDE, first.width));
  first.close();
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (plan.width * plan.height)));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.round(plan.width * scale), Math.round(plan.height * scale)];
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(scale, scale);
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, plan.width, plan.height);
  context.fillStyle = "#1d1c1a";
  for (const label of plan.labels) writeLabel(context, label);
  for (const { blob, x, y } of plan.images) {
    const bitmap = await createImageBitmap(blob);
    context.imageSmoothingEnabled = bitmap.width > LEAST_SIDE / 2;
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, x, y, plan.side, plan.side);
    bitmap.close();
  }
  /** @type {Blob} */
  const blob = await new Promise((resolve, reject) => {
    canvas.toBlob((made) => (made ? resolve(made) : reject(new Error("the browser made no PNG"))), "image/png");
  });
  const file = withTexts(new Uint8Array(await blob.arrayBuffer()), await textsOf(title, place, generations));
  return new Blob([file], { type: "image/png" });
}

/**
 * @param {string} title
 * @param {SheetPlace} place
 * @param {Generation[]} generations
 * @param {number} side
 * @returns {Plan}
 */
function planOf(title, place, generations, side) {
  const [rows, columns] = place.axes;
  const done = new Map(generations.map((each) => [/** @type {SheetPlace} */ (each.request.sheet).cell, each]));
  const isList = !rows;
  const most = Math.max(...generations.map(({ images }) => images.filter(({ isShown }) => isShown).length));
  const across = columns ? columns.values.length : rows ? columnsFor(place.numCells) : most;
  const down = isList ? place.numCells : Math.ceil(place.numCells / across);
  const left = MARGIN + (columns ? LABEL_WIDTH + GAP : isList ? CAPTION_WIDTH + GAP : 0);
  const width = Math.max(left + across * (side + GAP) - GAP + MARGIN, 480);
  const facts = factsOf(generations[0]);
  /** @type {Plan["labels"]} */
  const labels = [
    { text: title, x: MARGIN, y: MARGIN, width: width - 2 * MARGIN, style: "title" },
    ...[place.caption, place.caption && inLanguageShown(place.caption), facts].filter(Boolean).map((text, index) => ({
      ...{ text, x: MARGIN, y: MARGIN + 8 + (index + 1) * LINE, width: width - 2 * MARGIN, style: /** @type {Style} */ ("text") },
    })),
  ];
  const headed = MARGIN + 8 + labels.length * LINE + GAP;
  const top = headed + (columns ? LINE : 0);
  const step = side + GAP + (rows && !columns ? LINE : 0);
  if (columns)
    columns.values.forEach((value, column) => {
      const x = left + column * (side + GAP);
      labels.push({ text: wordShown(value), x, y: headed, width: side, style: "label", isCentred: true });
    });
  /** @type {Plan["images"]} */
  const images = [];
  for (let row = 0; row < down; row++) {
    const y = top + row * step;
    if (columns) labels.push({ text: wordShown(rows.values[row]), x: MARGIN, y: y + side / 2 - 9, width: LABEL_WIDTH, style: "label" });
    const caption = isList ? done.get(row)?.request.caption : "";
    if (caption) labels.push({ text: caption, x: MARGIN, y, width: CAPTION_WIDTH, style: "text" });
    for (let column = 0; column < across; column++) {
      const x = left + column * (side + GAP);
      const cell = row * across + column;
      const shown = isList ? done.get(row)?.images.filter(({ isShown }) => isShown)[column] : done.get(cell)?.images[0];
      if (shown) images.push({ blob: shown.blob, x, y });
      if (rows && !columns && cell < place.numCells)
        labels.push({ text: wordShown(rows.values[cell]), x, y: y + side + 2, width: side, style: "label", isCentred: true });
    }
  }
  return { width, height: top + down * step - GAP + MARGIN, labels, images, side };
}

/** @param {Generation} generation */
function factsOf({ request, modelId }) {
  const facts = [
    t("card.seed", { seed: request.seed }),
    t("card.candidates", { n: request.candidates }),
    `${t("settings.temperature_short")} ${formatNumber(request.temperature)}`,
    `${t("settings.guidance_short")} ${formatNumber(request.guidance)}`,
    modelId,
    t("sheet.ai"),
  ];
  return facts.join(" · ");
}

/**
 * A text from its upper left corner, in as many lines as it needs.
 * @param {CanvasRenderingContext2D} context
 * @param {Plan["labels"][0]} label
 */
function writeLabel(context, { text, x, y, width, style, isCentred }) {
  context.font = `${FONTS[style]} ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "top";
  context.textAlign = isCentred ? "center" : "left";
  let line = "";
  let at = y;
  for (const word of text.split(" ")) {
    const longer = line ? `${line} ${word}` : word;
    if (line && context.measureText(longer).width > width) {
      context.fillText(line, isCentred ? x + width / 2 : x, at, width);
      at += LINE - 2;
      line = word;
    } else line = longer;
  }
  context.fillText(line, isCentred ? x + width / 2 : x, at, width);
}

/**
 * What the PNG says of itself: the mark of AI as the server wrote it, and the provenance of every image.
 * @param {string} title
 * @param {SheetPlace} place
 * @param {Generation[]} generations
 * @returns {Promise<Map<string, string>>}
 */
async function textsOf(title, place, generations) {
  const cells = [];
  const marks = [];
  for (const { request, images } of generations) {
    for (const { blob, isShown } of images) {
      if (!isShown) continue;
      const texts = readTexts(new Uint8Array(await blob.arrayBuffer()));
      marks.push(texts?.get(XMP) ?? "");
      // As text: a seed may have more digits than a JavaScript number.
      cells.push(`{"cell":${request.sheet?.cell ?? 0},"provenance":${texts?.get(PROVENANCE) ?? "null"}}`);
    }
  }
  const head = JSON.stringify({ caption: place.caption, axes: place.axes }).slice(0, -1);
  const texts = new Map([
    ["Description", [title, place.caption].filter(Boolean).join(": ")],
    [SHEET, `${head},"images":[${cells.join(",")}]}`],
  ]);
  const mark = commonMark(marks);
  if (mark) texts.set(XMP, mark);
  return texts;
}
