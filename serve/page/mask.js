/**
 * The part of an image to inpaint: one bit a pixel, with undo. Plain values, no element but for making the PNG.
 *
 * The model regenerates whole cells of its token grid: every cell that a marked pixel touches, which `touchedCells`
 * returns, by the same rule as engine/pipeline/init_image.py. The server puts the kept pixels back.
 */

const MOST_UNDO = 40;

/**
 * @typedef {Uint8Array<ArrayBufferLike>} Bits
 *
 * @typedef {object} Mask
 * @property {number} size side in pixels of the image and the mask
 * @property {number} grid cells along a side
 * @property {() => Bits} marked size * size, 1 where to inpaint
 * @property {() => void} begin a change that one undo reverts
 * @property {(x: number, y: number, toX: number, toY: number, radius: number, value: 0|1) => void} stroke in pixels
 * @property {(row: number, column: number) => boolean} toggleCell whether it is marked now
 * @property {(value: 0|1) => void} fill
 * @property {() => boolean} undo
 * @property {() => boolean} redo
 * @property {() => boolean} canUndo
 * @property {() => boolean} canRedo
 * @property {() => boolean[]} touchedCells grid * grid
 */

/**
 * @param {number} size
 * @param {number} grid
 * @returns {Mask}
 */
export function createMask(size, grid) {
  /** @type {Bits} */
  let marked = new Uint8Array(size * size);
  /** @type {Bits[]} */
  const before = [];
  /** @type {Bits[]} */
  const after = [];
  /**
   * @param {Bits[]} from
   * @param {Bits[]} to
   */
  const step = (from, to) => {
    const other = from.pop();
    if (!other) return false;
    to.push(marked);
    marked = other;
    return true;
  };
  const begin = () => {
    before.push(marked.slice());
    if (before.length > MOST_UNDO) before.shift();
    after.length = 0;
  };
  return {
    size,
    grid,
    marked: () => marked,
    begin,
    stroke: (x, y, toX, toY, radius, value) => markStroke(marked, size, [x, y], [toX, toY], radius, value),
    toggleCell: (row, column) => {
      const value = anyInCell(marked, size, grid, row, column) ? 0 : 1;
      begin();
      fillCell(marked, size, grid, row, column, value);
      return value === 1;
    },
    fill: (value) => {
      begin();
      marked.fill(value);
    },
    undo: () => step(before, after),
    redo: () => step(after, before),
    canUndo: () => before.length > 0,
    canRedo: () => after.length > 0,
    touchedCells: () =>
      Array.from({ length: grid * grid }, (_, cell) =>
        anyInCell(marked, size, grid, Math.floor(cell / grid), cell % grid),
      ),
  };
}

/**
 * A round brush moved along a line: every pixel whose centre is within `radius` of it, and the one beneath the pointer.
 * @param {Bits} marked
 * @param {number} size
 * @param {[number, number]} from
 * @param {[number, number]} to
 * @param {number} radius
 * @param {0|1} value
 */
function markStroke(marked, size, [x, y], [toX, toY], radius, value) {
  const reach = Math.max(radius, 0.5);
  const [left, right] = [Math.min(x, toX) - reach, Math.max(x, toX) + reach];
  const [top, bottom] = [Math.min(y, toY) - reach, Math.max(y, toY) + reach];
  const [dx, dy] = [toX - x, toY - y];
  const lengthSquared = dx * dx + dy * dy;
  for (let row = Math.max(0, Math.floor(top)); row < Math.min(size, Math.ceil(bottom)); row++) {
    for (let column = Math.max(0, Math.floor(left)); column < Math.min(size, Math.ceil(right)); column++) {
      const [px, py] = [column + 0.5 - x, row + 0.5 - y];
      const along = lengthSquared ? Math.min(1, Math.max(0, (px * dx + py * dy) / lengthSquared)) : 0;
      if (Math.hypot(px - along * dx, py - along * dy) <= reach) marked[row * size + column] = value;
    }
  }
  const [column, row] = [Math.floor(toX), Math.floor(toY)];
  if (column >= 0 && row >= 0 && column < size && row < size) marked[row * size + column] = value;
}

/**
 * @param {number} size
 * @param {number} grid
 * @param {number} row
 * @param {number} column
 * @returns {[number, number, number, number]} first row, row after the last, first column, column after the last
 */
function cellEdges(size, grid, row, column) {
  /** @param {number} cell */
  const first = (cell) => Math.floor((cell * size) / grid);
  /** @param {number} cell */
  const after = (cell) => Math.ceil(((cell + 1) * size) / grid);
  return [first(row), after(row), first(column), after(column)];
}

/**
 * @param {Bits} marked
 * @param {number} size
 * @param {number} grid
 * @param {number} row
 * @param {number} column
 */
function anyInCell(marked, size, grid, row, column) {
  const [top, bottom, left, right] = cellEdges(size, grid, row, column);
  for (let y = top; y < bottom; y++) if (marked.subarray(y * size + left, y * size + right).includes(1)) return true;
  return false;
}

/**
 * Only pixels that lie wholly inside the cell, so that marking one does not touch the cells beside it.
 * @param {Bits} marked
 * @param {number} size
 * @param {number} grid
 * @param {number} row
 * @param {number} column
 * @param {0|1} value
 */
function fillCell(marked, size, grid, row, column, value) {
  const [outerTop, outerBottom, outerLeft, outerRight] = cellEdges(size, grid, row, column);
  const isWhole = value === 1;
  const top = isWhole ? Math.ceil((row * size) / grid) : outerTop;
  const bottom = isWhole ? Math.floor(((row + 1) * size) / grid) : outerBottom;
  const left = isWhole ? Math.ceil((column * size) / grid) : outerLeft;
  const right = isWhole ? Math.floor(((column + 1) * size) / grid) : outerRight;
  for (let y = top; y < bottom; y++) marked.fill(value, y * size + left, y * size + right);
}

/**
 * @param {Mask} mask
 * @returns {Promise<Blob>} PNG, as large as the image: fully transparent where to inpaint, black elsewhere
 */
export function maskPng(mask) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = mask.size;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const pixels = context.createImageData(mask.size, mask.size);
  mask.marked().forEach((value, index) => {
    pixels.data[index * 4 + 3] = value ? 0 : 255;
  });
  context.putImageData(pixels, 0, 0);
  return new Promise((resolve, reject) => {
    canvas.toBlob(
      (blob) => (blob ? resolve(blob) : reject(new Error("the browser made no PNG of the mask"))),
      "image/png",
    );
  });
}
