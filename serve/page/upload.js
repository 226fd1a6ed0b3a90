/**
 * The user's own image, made into what the server accepts: the middle square, no larger than needed, as PNG.
 *
 * A photo of 20 megapixels has 5 to 10 MB and would be refused; the model generates a few hundred pixels. The square is
 * cut here, by the same rule as on the server, so that what is painted over is what the server sees.
 */

const MOST_SIDE = 1024;
const LEAST_SIDE = 32;
const MOST_FILE_BYTES = 60 * 2 ** 20;

/** The file is no image that this page can use. */
export class UploadFault extends Error {
  /** @param {"type"|"large"|"small"|"broken"} reason */
  constructor(reason) {
    super(reason);
    this.reason = reason;
  }
}

/**
 * @param {File} file
 * @returns {Promise<Blob>} PNG, square, at most 1024 x 1024
 * @throws {UploadFault}
 */
export async function squareOf(file) {
  if (file.type && !file.type.startsWith("image/")) throw new UploadFault("type");
  if (file.size > MOST_FILE_BYTES) throw new UploadFault("large");
  const image = await decode(file);
  const side = Math.min(image.width, image.height);
  if (side < LEAST_SIDE) throw new UploadFault("small");
  const target = Math.min(side, MOST_SIDE);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = target;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "high";
  // What is transparent becomes white, as in training.
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, target, target);
  const [left, top] = [Math.floor((image.width - side) / 2), Math.floor((image.height - side) / 2)];
  context.drawImage(image, left, top, side, side, 0, 0, target, target);
  image.close();
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new UploadFault("broken"))), "image/png");
  });
}

/**
 * @param {File} file
 * @returns {Promise<ImageBitmap>} turned upright by its EXIF orientation
 */
async function decode(file) {
  try {
    return await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new UploadFault("broken");
  }
}

/**
 * Files that are dropped and pasted.
 * @param {(file: File) => void} take
 */
export function startDrops(take) {
  /** @param {DragEvent} event */
  const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (isFile(event) && !document.querySelector("dialog[open]")) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (file && !document.querySelector("dialog[open]")) take(file);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (file && !document.querySelector("dialog[open]")) take(file);
  });
}
