/**
 * The init image on a canvas: brush and eraser by mouse, pen or finger; cells by keyboard; or a line below which
 * everything is regenerated.
 *
 * It draws on the canvas and reads pointers and keys; what is marked belongs to mask.js, what follows from it to
 * editor.js.
 */

import { announce, isSmall } from "./elements.js";
import { t } from "./texts.js";

/**
 * @typedef {object} Work
 * @property {ImageBitmap} image square
 * @property {import("./mask.js").Mask} mask
 * @property {"rows"|"mask"|"strength"} kind
 * @property {number} keepRows
 * @property {"brush"|"eraser"} tool
 * @property {number} brushShare diameter of the brush, as a share of the image's side
 *
 * @typedef {object} View
 * @property {{row: number, column: number, isShown: boolean}} cursor of the keyboard
 * @property {[number, number]|null} pointer in pixels of the mask
 * @property {boolean} isDown
 */

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Work} work shared with the editor, which changes it too
 * @param {() => void} changed called after every change made here
 * @returns {{draw: () => void, stop: () => void}}
 */
export function startStage(canvas, work, changed) {
  /** @type {View} */
  const view = { cursor: { row: 0, column: 0, isShown: false }, pointer: null, isDown: false };
  const draw = () => drawStage(canvas, work, view);
  const done = () => {
    draw();
    changed();
  };
  listenToPointer(canvas, work, view, done, draw);
  canvas.addEventListener("keydown", (event) => {
    if (pressKey(event, work, view)) {
      event.preventDefault();
      done();
    }
  });
  canvas.addEventListener("focus", () => {
    view.cursor.isShown = canvas.matches(":focus-visible") && work.kind === "mask";
    draw();
  });
  canvas.addEventListener("blur", () => {
    view.cursor.isShown = false;
    draw();
  });
  const sizes = new ResizeObserver(() => {
    const side = Math.round(canvas.clientWidth * window.devicePixelRatio);
    if (side > 0 && side !== canvas.width) canvas.width = canvas.height = side;
    draw();
  });
  sizes.observe(canvas);
  return { draw, stop: () => sizes.disconnect() };
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Work} work
 * @param {View} view
 * @param {() => void} done
 * @param {() => void} draw
 */
function listenToPointer(canvas, work, view, done, draw) {
  /**
   * @param {PointerEvent} event
   * @returns {[number, number]}
   */
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = work.mask.size / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  /**
   * @param {[number, number]} from
   * @param {[number, number]} to
   */
  const act = (from, to) => {
    if (work.kind === "rows") {
      const { size, grid } = work.mask;
      work.keepRows = Math.min(grid - 1, Math.max(1, Math.round((to[1] / size) * grid)));
    } else if (work.kind === "mask") {
      const radius = (work.brushShare * work.mask.size) / 2;
      work.mask.stroke(...from, ...to, radius, work.tool === "brush" ? 1 : 0);
    }
    done();
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    view.isDown = true;
    view.cursor.isShown = false;
    view.pointer = at(event);
    if (work.kind === "mask") work.mask.begin();
    act(view.pointer, view.pointer);
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = view.pointer;
    // A fast pen reports several places in one event: without them strokes have corners.
    const places = event.getCoalescedEvents?.() ?? [];
    for (const place of places.length ? places : [event]) {
      const to = at(place);
      if (view.isDown) act(view.pointer ?? last ?? to, to);
      view.pointer = to;
    }
    draw();
  });
  const end = () => {
    view.isDown = false;
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => {
    if (view.isDown) return;
    view.pointer = null;
    draw();
  });
}

/**
 * @param {KeyboardEvent} event
 * @param {Work} work
 * @param {View} view
 * @returns {boolean} whether it was meant for the stage
 */
function pressKey(event, work, view) {
  if (work.kind !== "mask" || event.ctrlKey || event.metaKey || event.altKey) return false;
  const { cursor } = view;
  const last = work.mask.grid - 1;
  /** @type {Record<string, [number, number]>} */
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (event.key in moves) {
    const [rows, columns] = moves[event.key];
    cursor.row = Math.min(last, Math.max(0, cursor.row + rows));
    cursor.column = Math.min(last, Math.max(0, cursor.column + columns));
  } else if (event.key === "Home") cursor.column = 0;
  else if (event.key === "End") cursor.column = last;
  else if (event.key === " " || event.key === "Enter") work.mask.toggleCell(cursor.row, cursor.column);
  else return false;
  cursor.isShown = true;
  const isMarked = work.mask.touchedCells()[cursor.row * work.mask.grid + cursor.column];
  announce(t(isMarked ? "editor.cell_marked" : "editor.cell_kept", { row: cursor.row + 1, column: cursor.column + 1 }));
  return true;
}

// ------------------------------------------------------------------------------------------------------------ drawing

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Work} work
 * @param {View} view
 */
function drawStage(canvas, work, view) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const side = canvas.width;
  context.imageSmoothingEnabled = !isSmall(work.image.width);
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, side, side);
  context.drawImage(work.image, 0, 0, side, side);
  if (work.kind === "rows") drawRows(context, side, work);
  else if (work.kind === "mask") drawMarks(context, side, work, view);
}

/**
 * A veil over what is regenerated, and the line that can be moved.
 * @param {CanvasRenderingContext2D} context
 * @param {number} side
 * @param {Work} work
 */
function drawRows(context, side, work) {
  const top = Math.round((work.keepRows / work.mask.grid) * side);
  context.fillStyle = hatching(context, 24, 1.5);
  context.fillRect(0, top, side, side - top);
  context.fillStyle = "#ffffff";
  context.fillRect(0, top - 3, side, 6);
  context.fillStyle = "#26407f";
  context.fillRect(0, top - 2, side, 4);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {number} side
 * @param {Work} work
 * @param {View} view
 */
function drawMarks(context, side, work, view) {
  const { mask } = work;
  const cell = side / mask.grid;
  context.drawImage(marksLayer(mask, side, context), 0, 0);
  context.lineWidth = Math.max(1, side / 400);
  mask.touchedCells().forEach((isTouched, index) => {
    if (!isTouched) return;
    const [left, top] = [(index % mask.grid) * cell, Math.floor(index / mask.grid) * cell];
    frame(context, left, top, cell, cell, context.lineWidth);
  });
  if (view.cursor.isShown)
    frame(context, view.cursor.column * cell, view.cursor.row * cell, cell, cell, Math.max(3, side / 120));
  if (view.pointer && !view.cursor.isShown) {
    const scale = side / mask.size;
    const radius = Math.max(0.5, (work.brushShare * mask.size) / 2) * scale;
    for (const [style, width] of /** @type {[string, number][]} */ ([
      ["#ffffff", 3],
      ["#111111", 1],
    ])) {
      context.beginPath();
      context.arc(view.pointer[0] * scale, view.pointer[1] * scale, radius, 0, 2 * Math.PI);
      Object.assign(context, { strokeStyle: style, lineWidth: width });
      context.stroke();
    }
  }
}

/**
 * Dark within light, so that it shows on any image.
 * @param {CanvasRenderingContext2D} context
 * @param {number} left
 * @param {number} top
 * @param {number} width
 * @param {number} height
 * @param {number} thickness
 */
function frame(context, left, top, width, height, thickness) {
  context.lineWidth = thickness + 2;
  context.strokeStyle = "rgb(255 255 255 / 0.85)";
  context.strokeRect(left + 1, top + 1, width - 2, height - 2);
  context.lineWidth = thickness;
  context.strokeStyle = "#26407f";
  context.strokeRect(left + 1, top + 1, width - 2, height - 2);
}

/**
 * The marked pixels at the size shown, hatched: plain colour would hide on an image of that colour.
 * @param {import("./mask.js").Mask} mask
 * @param {number} side
 * @param {CanvasRenderingContext2D} context
 */
function marksLayer(mask, side, context) {
  const small = new OffscreenCanvas(mask.size, mask.size);
  const smallContext = contextOf(small);
  const pixels = smallContext.createImageData(mask.size, mask.size);
  mask.marked().forEach((value, index) => {
    pixels.data[index * 4 + 3] = value * 255;
  });
  smallContext.putImageData(pixels, 0, 0);
  const layer = new OffscreenCanvas(side, side);
  const layerContext = contextOf(layer);
  layerContext.imageSmoothingEnabled = false;
  layerContext.drawImage(small, 0, 0, side, side);
  layerContext.globalCompositeOperation = "source-in";
  layerContext.fillStyle = hatching(context, 12, 2.5);
  layerContext.fillRect(0, 0, side, side);
  return layer;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {number} side of the repeated tile
 * @param {number} thickness of the lines
 * @returns {CanvasPattern} translucent lines
 */
function hatching(context, side, thickness) {
  const tile = new OffscreenCanvas(side, side);
  const pen = contextOf(tile);
  pen.fillStyle = "rgb(250 248 243 / 0.62)";
  pen.fillRect(0, 0, side, side);
  pen.strokeStyle = "rgb(38 64 127 / 0.85)";
  pen.lineWidth = thickness;
  for (const shift of [-side, 0, side]) {
    pen.beginPath();
    pen.moveTo(shift, side);
    pen.lineTo(shift + side, 0);
    pen.stroke();
  }
  return /** @type {CanvasPattern} */ (context.createPattern(tile, "repeat"));
}

/** @param {OffscreenCanvas} canvas */
function contextOf(canvas) {
  return /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
}
