/**
 * Drawings that survive a reload: pictures as bytes, with everything that made them, in IndexedDB.
 *
 * Where the browser has no IndexedDB (some private windows, some policies) the same calls work on memory, and
 * `isLasting` is false so that the page can say so. A full disk is a `StorageFull`: nothing is dropped in silence.
 */

/**
 * @typedef {object} Picture
 * @property {number} candidate its number among those drawn, from 0
 * @property {number} rank 1 is best
 * @property {number|null} score KoCLIP's; null without a ranker
 * @property {Blob} blob PNG with its making in its metadata
 * @property {boolean} isShown among the best that were asked for, not only a candidate
 * @property {boolean} isFavourite
 *
 * @typedef {object} Drawing
 * @property {string} id sorts by time
 * @property {number} createdMs
 * @property {import("./api.js").ImageRequest} request
 * @property {string} modelId
 * @property {string} modelDigest
 * @property {number} gridSize rows of tokens in a picture: what can be kept of it
 * @property {number} tokensCut text tokens that did not fit the model
 * @property {number|null} totalS seconds it took
 * @property {Picture[]} pictures best first
 *
 * @typedef {object} Store
 * @property {boolean} isLasting
 * @property {(drawing: Drawing) => Promise<void>} put
 * @property {(id: string, edit: (drawing: Drawing) => Drawing|null) => Promise<Drawing|null>} change null removes it
 * @property {(before: string|null, count: number, wanted: (drawing: Drawing) => boolean) => Promise<Drawing[]>} newest
 * @property {() => Promise<number>} count of drawings
 * @property {() => Promise<void>} clear
 */

const NAME = "kodalle";
const TABLE = "drawings";

/** The browser's share of the disk is used up. */
export class StorageFull extends Error {}

/**
 * @returns {string} a new id; later ones sort after earlier ones
 */
export function newId() {
  const random = crypto.getRandomValues(new Uint32Array(1))[0];
  return `${String(Date.now()).padStart(14, "0")}-${random.toString(16).padStart(8, "0")}`;
}

/**
 * @returns {Promise<Store>}
 */
export async function openStore() {
  try {
    return lastingStore(await openDatabase());
  } catch (error) {
    console.warn("no IndexedDB, drawings are kept in memory only:", error);
    return memoryStore();
  }
}

/**
 * Asks the browser not to clear the drawings away when the disk runs short.
 * @returns {Promise<void>}
 */
export async function askToPersist() {
  await navigator.storage?.persist?.();
}

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE, { keyPath: "id" });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
    opening.onblocked = () => reject(new Error("another window holds an older form of the database"));
  });
}

/**
 * @param {IDBDatabase} database
 * @returns {Store}
 */
function lastingStore(database) {
  // Another window with a newer page may change the form of the table: it must not wait for this one.
  database.onversionchange = () => database.close();

  /**
   * @template Result
   * @param {IDBTransactionMode} mode
   * @param {(table: IDBObjectStore, give: (result: Result) => void) => void} act
   * @returns {Promise<Result>} what was given, once it is on disk
   */
  const transact = (mode, act) =>
    new Promise((resolve, reject) => {
      let result;
      const transaction = database.transaction(TABLE, mode);
      transaction.oncomplete = () => resolve(result);
      transaction.onabort = () => {
        const isFull = transaction.error?.name === "QuotaExceededError";
        reject(isFull ? new StorageFull(transaction.error.message) : transaction.error);
      };
      act(transaction.objectStore(TABLE), (given) => {
        result = given;
      });
    });

  return {
    isLasting: true,
    put: (drawing) => transact("readwrite", (table) => table.put(drawing)),
    change: (id, edit) =>
      transact("readwrite", (table, give) => {
        const found = table.get(id);
        found.onsuccess = () => {
          const changed = found.result ? edit(found.result) : null;
          if (changed) table.put(changed);
          else table.delete(id);
          give(changed);
        };
      }),
    newest: (before, count, wanted) =>
      transact("readonly", (table, give) => {
        const found = [];
        give(found);
        const range = before === null ? null : IDBKeyRange.upperBound(before, true);
        const opening = table.openCursor(range, "prev");
        opening.onsuccess = () => {
          const cursor = opening.result;
          if (!cursor || found.length === count) return;
          if (wanted(cursor.value)) found.push(cursor.value);
          cursor.continue();
        };
      }),
    count: () =>
      transact("readonly", (table, give) => {
        const counting = table.count();
        counting.onsuccess = () => give(counting.result);
      }),
    clear: () => transact("readwrite", (table) => table.clear()),
  };
}

/** @returns {Store} */
function memoryStore() {
  /** @type {Map<string, Drawing>} */
  const drawings = new Map();
  return {
    isLasting: false,
    put: async (drawing) => void drawings.set(drawing.id, drawing),
    change: async (id, edit) => {
      const found = drawings.get(id);
      const changed = found ? edit(found) : null;
      if (changed) drawings.set(id, changed);
      else drawings.delete(id);
      return changed;
    },
    newest: async (before, count, wanted) =>
      [...drawings.values()]
        .sort((one, other) => (one.id < other.id ? 1 : -1))
        .filter((drawing) => (before === null || drawing.id < before) && wanted(drawing))
        .slice(0, count),
    count: async () => drawings.size,
    clear: async () => drawings.clear(),
  };
}
