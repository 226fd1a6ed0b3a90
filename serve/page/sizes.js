/**
 * Downloads in a chosen size. The server generates the same image again, by its seed, and enlarges it (Lanczos): so the file
 * has the provenance and the marks of any other, and says that it was enlarged.
 */

import { ApiError, blobOf, generate } from "./api.js";
import { announce, element, showBriefly } from "./elements.js";
import { download, saveFile } from "./library.js";
import { servedModel } from "./model.js";
import { t } from "./texts.js";

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./store.js").RankedImage} RankedImage
 * @typedef {import("./api.js").Model} Model
 */

/**
 * A choice of sizes, with what each means, and the download.
 * @param {Generation} generation
 * @param {number} index of the image
 * @returns {{field: HTMLElement, save: () => Promise<void>}}
 */
export function sizeChoice(generation, index) {
  const image = generation.images[index];
  const model = servedModel();
  const isOther = model !== null && model.digest !== generation.modelDigest;
  const own = model && !isOther ? t("size.own", { side: model.image_size }) : t("size.own_unknown");
  const sides = model ? sidesOf(model, generation, image) : [];
  const select = element(
    "select",
    { id: "viewer-size", "aria-describedby": "viewer-size-hint" },
    element("option", { value: "0", text: own }),
    ...sides.map((side) => element("option", { value: side, text: t("size.enlarged", { side }) })),
  );
  const hint = element("p", { id: "viewer-size-hint", class: "hint numbers" });
  /** @param {string} [progress] */
  const show = (progress) => {
    const meaning = isOther ? t("size.other_model") : select.value === "0" ? "" : t("size.hint");
    hint.textContent = progress ?? meaning;
    hint.hidden = hint.textContent === "";
  };
  select.addEventListener("change", () => show());
  show();
  let isBusy = false;
  return {
    field: element(
      "div",
      { class: "field" },
      element("label", { for: "viewer-size", text: t("size.label") }),
      select,
      hint,
    ),
    save: async () => {
      const side = Number(select.value);
      if (side === 0) return download(generation, index);
      if (isBusy || !model) return;
      isBusy = true;
      announce(t("size.started", { side }));
      await saveEnlarged(model, generation, image, side, (share) =>
        show(t("size.progress", { side, percent: Math.floor(100 * share) })),
      );
      isBusy = false;
      show();
    },
  };
}

/**
 * @param {Model} model
 * @param {Generation} generation
 * @param {RankedImage} image
 * @param {number} side in pixels
 * @param {(share: number) => void} onProgress
 */
async function saveEnlarged(model, generation, image, side, onProgress) {
  const way = wayOf(model, generation, image, side);
  if (!way) return;
  const request = { ...generation.request, n: way.n, candidates: way.candidates };
  const fields = { size: `${side}x${side}`, all_candidates: way.all };
  onProgress(0);
  try {
    for await (const event of generate(request, 0, new AbortController().signal, fields)) {
      if (event.type.endsWith(".progress")) onProgress(event.tokens_generated / event.tokens_total);
      if (!/\.(candidate|completed)$/u.test(event.type) || event.candidate !== image.candidate) continue;
      saveFile(blobOf(event.b64_json, event.output_format), `kodalle-${request.seed}-${image.candidate}-${side}.png`);
      return;
    }
    throw new Error(`candidate ${image.candidate} did not come`);
  } catch (error) {
    console.warn("no enlarged image:", error);
    showBriefly(error instanceof ApiError ? error.text : t("size.failed"));
  }
}

/**
 * @param {Model} model
 * @param {Generation} generation
 * @param {RankedImage} image
 * @returns {number[]} twice, three times, four times the model's side, and the server's largest
 */
function sidesOf(model, generation, image) {
  if (model.digest !== generation.modelDigest) return [];
  const sides = [2, 3, 4].map((times) => times * model.image_size).filter((side) => side < model.max_size);
  return [...sides, model.max_size]
    .filter((side) => side > model.image_size)
    .filter((side) => wayOf(model, generation, image, side) !== null);
}

/**
 * How to get one candidate with few others: a seed's candidate is the same however many are generated, and ranks are the
 * same when all of them are. An answer's enlarged images share a limit of pixels.
 * @param {Model} model
 * @param {Generation} generation
 * @param {RankedImage} image
 * @param {number} side
 * @returns {{n: number, candidates: number, all: boolean}|null} null: the server would refuse
 */
function wayOf(model, generation, { candidate, rank }, side) {
  const { images } = model.limits;
  const most = images * model.max_size ** 2;
  if ((candidate + 1) * side ** 2 <= most) return { n: 1, candidates: candidate + 1, all: true };
  if (rank <= images && rank * side ** 2 <= most) return { n: rank, candidates: generation.request.candidates, all: false };
  return null;
}
