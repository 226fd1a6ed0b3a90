/**
 * Finished generations: stored, marked as favourites, downloaded and deleted, and the board and the gallery kept up to
 * date.
 */

import { showBriefly } from "./elements.js";
import { ask } from "./question.js";
import { StorageFull, requestPersistence } from "./store.js";
import { t } from "./texts.js";

/**
 * @typedef {import("./store.js").Generation} Generation
 *
 * @typedef {object} Library
 * @property {(job: import("./queue.js").Job, model: import("./api.js").Model|null) => Promise<void>} add
 * @property {(generation: Generation, index: number, isFavourite: boolean) => Promise<Generation>} favour
 * @property {(generation: Generation, index: number) => Promise<boolean>} removeImage whether it was, after a question
 * @property {() => Promise<void>} clear after a question
 * @property {(news: import("./windows.js").News) => Promise<void>} follow what another window did
 */

/**
 * @param {import("./store.js").Store} store
 * @param {import("./cards.js").Board} board
 * @param {import("./gallery.js").Gallery} gallery
 * @param {ReturnType<typeof import("./windows.js").startWindows>} report to other windows
 * @returns {Library}
 */
export function createLibrary(store, board, gallery, report) {
  /** @type {Set<string>} ids of generations that could not be stored */
  const unsaved = new Set();

  /**
   * @param {Generation} generation
   * @param {(generation: Generation) => Generation|null} edit
   * @returns {Promise<Generation|null>} null when nothing is left of it
   */
  const change = async (generation, edit) => {
    const changed = unsaved.has(generation.id) ? edit(generation) : await store.change(generation.id, edit);
    if (changed) board.update(changed);
    else board.remove(generation.id);
    report(changed ? "changed" : "removed", generation.id);
    await gallery.refresh();
    return changed;
  };

  return {
    add: async (job, model) => {
      const { id, createdMs, request, images, tokensCut, words, totalS } = job;
      const origin = { modelId: model?.id ?? "", modelDigest: model?.digest ?? "", gridSize: model?.grid_size ?? 0 };
      const generation = { id, createdMs, request, ...origin, tokensCut, words, totalS, images };
      board.showGeneration(generation);
      try {
        await store.put(generation);
        report("stored", id);
        await gallery.refresh();
      } catch (error) {
        unsaved.add(id);
        const text = t(error instanceof StorageFull ? "gallery.full" : "gallery.not_saved");
        console.warn("a generation was not stored:", error);
        board.warn(id, text);
        gallery.showFault(text);
        showBriefly(text);
      }
    },
    favour: async (generation, index, isFavourite) => {
      const { candidate } = generation.images[index];
      /** @param {Generation} each */
      const edit = (each) => ({
        ...each,
        images: each.images.map((one) => (one.candidate === candidate ? { ...one, isFavourite } : one)),
      });
      const changed = await change(generation, edit);
      if (isFavourite) void requestPersistence();
      return changed ?? edit(generation);
    },
    removeImage: async (generation, index) => {
      const { candidate, rank } = generation.images[index];
      const isConfirmed = await ask({
        title: t("remove.title"),
        text: t("remove.text", { rank }),
        yes: t("remove.yes"),
        isGrave: true,
      });
      if (!isConfirmed) return false;
      await change(generation, (each) => {
        const images = each.images.filter((one) => one.candidate !== candidate);
        // Where only candidates that were not shown are left, the user has deleted everything he saw.
        return images.some((one) => one.isShown || one.isFavourite) ? { ...each, images } : null;
      });
      return true;
    },
    clear: async () => {
      const text = t("clear.text", { n: await store.count() });
      if (!(await ask({ title: t("clear.title"), text, yes: t("clear.yes"), isGrave: true }))) return;
      await store.clear();
      report("cleared");
      board.clear();
      gallery.showFault("");
      await gallery.refresh();
    },
    follow: async ({ what, id }) => {
      if (what === "cleared") board.clear();
      else if (what === "removed") board.remove(id);
      else {
        const generation = await store.get(id);
        if (generation && what === "stored") board.showGeneration(generation);
        else if (generation) board.update(generation);
      }
      await gallery.refresh();
    },
  };
}

/**
 * @param {Generation} generation
 * @param {number} index
 */
export function download(generation, index) {
  const { blob, candidate } = generation.images[index];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `kodalle-${generation.request.seed}-${candidate}.png`;
  link.click();
  // The browser reads the URL after this call has returned.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
