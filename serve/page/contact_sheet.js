/**
 * A contact sheet: images with their captions on A4 pages, as PDF.
 *
 * The pixels are those of the files, and so are the marks: each image has its file's XMP, and the provenance of all is attached.
 */

import { createPdf } from "./pdf.js";
import { PROVENANCE, XMP, commonMark, readTexts } from "./png_text.js";
import { formatNumber, language, t } from "./texts.js";

// Points, of 1/72 inch.
const PAGE = { width: 595, height: 842 };
const MARGIN = 36;
const HEAD = 34;
const FOOT = 22;
const COLUMNS = 3;
const ROWS = 3;
const GAP = 14;
const SIDE = (PAGE.width - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS;
const CELL = (PAGE.height - 2 * MARGIN - HEAD - FOOT) / ROWS;
const CAPTION = { size: 7.2, leading: 9.6, most: 5 };
const PIXELS_A_POINT = 200 / 72; // of text: 200 dots an inch

/**
 * @typedef {import("./library.js").Picture} Picture
 */

/**
 * @param {Picture[]} pictures
 * @returns {Promise<Blob>}
 */
export async function contactSheet(pictures) {
  const pdf = createPdf();
  const marks = await Promise.all(pictures.map(({ image }) => marksOf(image.blob)));
  const title = t("contact.title", { n: pictures.length });
  const today = new Intl.DateTimeFormat(language(), { dateStyle: "medium", timeStyle: "short" }).format(Date.now());
  const perPage = COLUMNS * ROWS;
  const numPages = Math.ceil(pictures.length / perPage);
  for (let page = 0; page < numPages; page++) {
    const own = pictures.slice(page * perPage, (page + 1) * perPage);
    const painter = createPainter();
    painter.text(title, { x: MARGIN, y: MARGIN + 14, size: 13, isBold: true });
    painter.text(today, { x: PAGE.width - MARGIN, y: MARGIN + 14, size: 8, isRight: true });
    painter.text(t("contact.ai"), { x: MARGIN, y: PAGE.height - MARGIN, size: 8 });
    painter.text(t("contact.page", { n: page + 1, total: numPages }), {
      x: PAGE.width - MARGIN,
      y: PAGE.height - MARGIN,
      size: 8,
      isRight: true,
    });
    const images = [];
    for (const [place, picture] of own.entries()) {
      const left = MARGIN + (place % COLUMNS) * (SIDE + GAP);
      const top = MARGIN + HEAD + Math.floor(place / COLUMNS) * CELL;
      const number = page * perPage + place;
      const box = { x: left, y: PAGE.height - top - SIDE, width: SIDE, height: SIDE };
      const image = await pdf.addImage(await canvasOf(picture.image.blob), { xmp: marks[number].xmp });
      images.push({ image, box });
      captionBelow(painter, picture, number + 1, left, top + SIDE + 12);
    }
    const ground = await pdf.addImage(painter.canvas, { isGrey: true });
    const whole = { x: 0, y: 0, ...PAGE };
    await pdf.addPage(PAGE.width, PAGE.height, [{ image: ground, box: whole }, ...images], painter.lines);
  }
  return pdf.finish({
    title,
    language: language(),
    xmp: commonMark(marks.map(({ xmp }) => xmp)),
    // As it stands in the files: read and written again, a seed would lose digits beyond 2**53.
    attachments: [{ name: "provenance.json", content: `[\n${marks.map(({ provenance }) => provenance).join(",\n")}\n]\n` }],
  });
}

/**
 * @param {Blob} png
 * @returns {Promise<{provenance: string, xmp: string}>} JSON, "null" in a file without; "" without XMP
 */
async function marksOf(png) {
  const texts = readTexts(new Uint8Array(await png.arrayBuffer()));
  return { provenance: texts?.get(PROVENANCE) ?? "null", xmp: texts?.get(XMP) ?? "" };
}

/**
 * @param {ReturnType<typeof createPainter>} painter
 * @param {Picture} picture
 * @param {number} number
 * @param {number} x
 * @param {number} y
 */
function captionBelow(painter, { generation, image }, number, x, y) {
  const { request } = generation;
  const facts = [formatNumber(number), t("image.rank", { rank: image.rank }), t("card.seed", { seed: request.seed })];
  painter.text(facts.join(" · "), { x, y, size: 8, isBold: true });
  const lines = painter.wrapped(request.caption, CAPTION.size, SIDE);
  if (lines.length > CAPTION.most) lines.splice(CAPTION.most - 1, Infinity, `${lines[CAPTION.most - 1].slice(0, -1)}…`);
  lines.forEach((line, index) => painter.text(line, { x, y: y + 11 + index * CAPTION.leading, size: CAPTION.size }));
}

/** A page's text as an image, and as lines for `pdf.js`; places in points from the upper left corner. */
function createPainter() {
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(PAGE.width * PIXELS_A_POINT);
  canvas.height = Math.round(PAGE.height * PIXELS_A_POINT);
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#1d1c1a";
  context.scale(PIXELS_A_POINT, PIXELS_A_POINT);
  const family = getComputedStyle(document.body).fontFamily;
  /** @type {import("./pdf.js").Line[]} */
  const lines = [];
  /**
   * @param {number} size
   * @param {boolean} [isBold]
   */
  const use = (size, isBold = false) => (context.font = `${isBold ? 700 : 400} ${size}px ${family}`);
  return {
    canvas,
    lines,
    /**
     * @param {string} text
     * @param {{x: number, y: number, size: number, isBold?: boolean, isRight?: boolean}} options `y` of its baseline
     */
    text: (text, { x, y, size, isBold, isRight }) => {
      use(size, isBold);
      const { width } = context.measureText(text);
      const left = isRight ? x - width : x;
      context.fillText(text, left, y);
      lines.push({ text, x: left, y: PAGE.height - y, size, width });
    },
    /**
     * @param {string} text
     * @param {number} size
     * @param {number} width
     * @returns {string[]} lines of whole words, where they fit
     */
    wrapped: (text, size, width) => {
      use(size);
      const fits = (/** @type {string} */ line) => context.measureText(line).width <= width;
      /** @type {string[]} */
      const found = [];
      for (const word of text.split(" ")) {
        const longer = found.length ? `${found[found.length - 1]} ${word}` : word;
        if (found.length && fits(longer)) found[found.length - 1] = longer;
        else {
          let line = "";
          for (const letter of word) {
            if (!fits(line + letter)) {
              found.push(line);
              line = "";
            }
            line += letter;
          }
          found.push(line);
        }
      }
      return found;
    },
  };
}

/**
 * @param {Blob} blob
 * @returns {Promise<HTMLCanvasElement>} its pixels; what is transparent becomes white, as paper is
 */
async function canvasOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas;
}
