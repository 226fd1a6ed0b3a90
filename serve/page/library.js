/**
 * Finished generations: stored, marked as favourites, collected, downloaded and deleted, and the board and the gallery kept
 * up to date.
 */

import { chooseCollections } from "./collections.js";
import { showBriefly } from "./elements.js";
import { ask } from "./question.js";
import { StorageFull, isKept, newId, requestPersistence } from "./store.js";
import { t } from "./texts.js";

/**
 * @typedef {import("./store.js").Generation} Generation
 * @typedef {import("./store.js").RankedImage} RankedImage
 *
 * @typedef {{generation: Generation, image: RankedImage}} Picture
 *
 * @typedef {object} Library
 * @property {(job: import("./queue.js").Job, model: import("./api.js").Model|null) => Promise<void>} add
 * @property {(generation: Generation, index: number, isFavourite: boolean) => Promise<Generation>} favour
 * @property {(generation: Generation, index: number) => Promise<boolean>} removeImage whether it was, after a question
 * @property {(pictures: Picture[]) => Promise<boolean>} removeImages the same for many, after one question
 * @property {(pictures: Picture[]) => Promise<void>} collect puts them into collections and takes them out, after a question
 * @property {(id: string) => Promise<void>} stripCollection takes every image out of it
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

  /** @param {unknown} error why something was not stored */
  const showUnsaved = (error) => {
    const text = t(error instanceof StorageFull ? "gallery.full" : "gallery.not_saved");
    console.warn("not stored:", error);
    gallery.showFault(text);
    showBriefly(text);
    return text;
  };
  /**
   * @param {Generation} generation
   * @param {(generation: Generation) => Generation|null} edit
   * @returns {Promise<Generation|null>} null when nothing is left of it; as it was where the disk is full
   */
  const changeOne = async (generation, edit) => {
    let changed = generation;
    try {
      const found = unsaved.has(generation.id) ? edit(generation) : await store.change(generation.id, edit);
      if (!found) {
        board.remove(generation.id);
        report("removed", generation.id);
        return null;
      }
      changed = found;
      report("changed", generation.id);
    } catch (error) {
      showUnsaved(error);
    }
    board.update(changed);
    return changed;
  };
  /**
   * @param {Picture[]} pictures
   * @param {(image: RankedImage) => RankedImage|null} edit null removes it
   * @returns {Promise<Generation|null>} the last generation that was changed; null when nothing is left of it
   */
  const changeImages = async (pictures, edit) => {
    /** @type {Map<string, {generation: Generation, candidates: Set<number>}>} */
    const wanted = new Map();
    for (const { generation, image } of pictures) {
      const entry = wanted.get(generation.id) ?? { generation, candidates: new Set() };
      wanted.set(generation.id, entry);
      entry.candidates.add(image.candidate);
    }
    let changed = null;
    for (const { generation, candidates } of wanted.values())
      changed = await changeOne(generation, (each) => {
        const images = each.images.flatMap((one) => (candidates.has(one.candidate) ? (edit(one) ?? []) : [one]));
        // Where only candidates that were not shown are left, the user has deleted everything he saw.
        const isLeft = images.length === each.images.length || images.some(isKept);
        return isLeft ? { ...each, images } : null;
      });
    await gallery.refresh();
    return changed;
  };

  /**
   * @param {Picture} picture that may have changed since it was shown
   * @returns {Promise<Picture>}
   */
  const currentOf = async (picture) => {
    const images = (await store.get(picture.generation.id))?.images ?? [];
    return { ...picture, image: images.find(({ candidate }) => candidate === picture.image.candidate) ?? picture.image };
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
        board.warn(id, showUnsaved(error));
      }
    },
    favour: async (generation, index, isFavourite) => {
      const changed = await changeImages([{ generation, image: generation.images[index] }], (image) => ({
        ...image,
        isFavourite,
      }));
      if (isFavourite) void requestPersistence();
      return changed ?? generation;
    },
    removeImage: async (generation, index) => {
      const image = generation.images[index];
      const isConfirmed = await ask({
        title: t("remove.title"),
        text: t("remove.text", { rank: image.rank }),
        yes: t("remove.yes"),
        isGrave: true,
      });
      if (isConfirmed) await changeImages([{ generation, image }], () => null);
      return isConfirmed;
    },
    removeImages: async (pictures) => {
      const n = pictures.length;
      const favourites = pictures.filter(({ image }) => image.isFavourite).length;
      const text = [t("remove_many.text", { n }), favourites ? t("remove_many.favourites", { n: favourites }) : ""];
      const isConfirmed = await ask({
        title: t("remove_many.title", { n }),
        text: text.filter(Boolean).join(" "),
        yes: t("remove.yes"),
        isGrave: true,
      });
      if (isConfirmed) await changeImages(pictures, () => null);
      return isConfirmed;
    },
    collect: async (pictures) => {
      const current = await Promise.all(pictures.map(currentOf));
      const choice = await chooseCollections(await store.collections(), current);
      if (!choice) return;
      const { added, removed, created } = choice;
      try {
        if (created) {
          const id = newId();
          await store.putCollection({ id, name: created });
          report("collections");
          added.add(id);
        }
      } catch (error) {
        showUnsaved(error);
        return;
      }
      await changeImages(pictures, (image) => {
        const others = (image.collections ?? []).filter((id) => !removed.has(id) && !added.has(id));
        return { ...image, collections: [...others, ...added] };
      });
      void requestPersistence();
      showBriefly(t("collection.done", { n: pictures.length }));
    },
    stripCollection: async (id) => {
      const generations = await store.newest(null, Infinity, ({ images }) => images.some((one) => one.collections?.includes(id)));
      const pictures = generations.flatMap((generation) => generation.images.map((image) => ({ generation, image })));
      await changeImages(pictures, (image) => ({ ...image, collections: image.collections?.filter((each) => each !== id) }));
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
      else if (what === "collections") await gallery.refresh();
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
  saveFile(blob, `kodalle-${generation.request.seed}-${candidate}.png`);
}

/**
 * @param {Blob} blob
 * @param {string} name of the file
 */
export function saveFile(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  // The browser reads the URL after this call has returned.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
