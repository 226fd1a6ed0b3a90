/**
 * Generations that survive a reload: images as bytes, with everything that made them, in IndexedDB.
 *
 * Where the browser has no IndexedDB (some private windows, some policies) the same calls work on memory, and
 * `isLasting` is false so that the page can say so. A full disk is a `StorageFull`: nothing is dropped silently.
 */

/**
 * @typedef {object} RankedImage
 * @property {number} candidate its number among the candidates, from 0
 * @property {number} rank 1 is best
 * @property {number|null} score KoCLIP's; null without a ranker
 * @property {number|null} [percentile] of the score among real pairs, 0 to 100; null where it has none
 * @property {Blob} blob PNG with its provenance in its metadata
 * @property {boolean} isShown among the best that were requested, not only a candidate
 * @property {boolean} isFavourite
 * @property {string[]} [collections] ids of those that it is in
 *
 * @typedef {{id: string, name: string}} Collection
 *
 * @typedef {object} Generation
 * @property {string} id sorts by time
 * @property {number} createdMs
 * @property {import("./api.js").ImageRequest} request
 * @property {string} modelId
 * @property {string} modelDigest
 * @property {number} gridSize rows of tokens in an image
 * @property {number} tokensCut text tokens that did not fit the model
 * @property {{total: number, known: number, unknown: string[]}|null} [words] of the caption, as the model knows them
 * @property {number|null} totalS seconds it took
 * @property {RankedImage[]} images best first
 *
 * @typedef {{id: string, createdMs: number, request: import("./api.js").ImageRequest}} StoredRequest of a generation that
 *   has not ended, its seed included
 *
 * @typedef {object} Store
 * @property {boolean} isLasting
 * @property {(generation: Generation) => Promise<void>} put
 * @property {(id: string, edit: (generation: Generation) => Generation|null) => Promise<Generation|null>} change null
 *   removes it
 * @property {(before: string|null, count: number, isWanted: (generation: Generation) => boolean, after?: string) =>
 *   Promise<Generation[]>} newest those between the two ids, which are not among them
 * @property {(id: string) => Promise<Generation|null>} get
 * @property {() => Promise<number>} count of generations
 * @property {() => Promise<void>} clear
 * @property {(request: StoredRequest) => Promise<void>} begin keeps a request until it has ended
 * @property {(id: string) => Promise<void>} end
 * @property {() => Promise<StoredRequest[]>} unended the oldest first
 * @property {() => Promise<Collection[]>} collections the oldest first
 * @property {(collection: Collection) => Promise<void>} putCollection a new one, or a new name
 * @property {(id: string) => Promise<void>} removeCollection its images stay
 */

const NAME = "kodalle";
const VERSION = 4;
const TABLE = "generations";
const REQUESTS = "requests"; // since version 3
const COLLECTIONS = "collections"; // since version 4
// Version 1 called the table `drawings` and an entry's images `pictures`.
const TABLE_1 = "drawings";

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
 * @param {RankedImage} image
 * @returns {boolean} whether the user sees it in the gallery; other candidates stay with their generation only
 */
export function isKept(image) {
  return image.isShown || image.isFavourite || Boolean(image.collections?.length);
}

/**
 * @returns {Promise<Store>}
 */
export async function openStore() {
  try {
    return lastingStore(await openDatabase());
  } catch (error) {
    console.warn("no IndexedDB, generations are kept in memory only:", error);
    return memoryStore();
  }
}

/**
 * Requests that the browser does not delete the generations when the disk runs short.
 * @returns {Promise<void>}
 */
export async function requestPersistence() {
  await navigator.storage?.persist?.();
}

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, VERSION);
    opening.onupgradeneeded = () => upgrade(opening.result, /** @type {IDBTransaction} */ (opening.transaction));
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
    opening.onblocked = () => reject(new Error("another window holds an older version of the database"));
  });
}

/**
 * @param {IDBDatabase} database
 * @param {IDBTransaction} transaction
 */
function upgrade(database, transaction) {
  for (const name of [REQUESTS, COLLECTIONS])
    if (!database.objectStoreNames.contains(name)) database.createObjectStore(name, { keyPath: "id" });
  if (database.objectStoreNames.contains(TABLE)) return;
  if (!database.objectStoreNames.contains(TABLE_1)) {
    database.createObjectStore(TABLE, { keyPath: "id" });
    return;
  }
  const table = transaction.objectStore(TABLE_1);
  table.name = TABLE;
  const opening = table.openCursor();
  opening.onsuccess = () => {
    const cursor = opening.result;
    if (!cursor) return;
    const { pictures, ...rest } = cursor.value;
    if (pictures) cursor.update({ ...rest, images: pictures });
    cursor.continue();
  };
}

/**
 * @param {IDBDatabase} database
 * @returns {Store}
 */
function lastingStore(database) {
  // Another window with a newer page may upgrade the database: it must not wait for this one.
  database.onversionchange = () => database.close();

  /**
   * @template Result
   * @param {IDBTransactionMode} mode
   * @param {(table: IDBObjectStore, setResult: (result: Result) => void) => void} act
   * @param {string} [name] of the table
   * @returns {Promise<Result>} the result that was set, once the transaction is on disk
   */
  const transact = (mode, act, name = TABLE) =>
    new Promise((resolve, reject) => {
      /** @type {Result} */
      let result;
      const transaction = database.transaction(name, mode);
      transaction.oncomplete = () => resolve(result);
      transaction.onabort = () => {
        const { error } = transaction;
        reject(error?.name === "QuotaExceededError" ? new StorageFull(error.message) : error);
      };
      act(transaction.objectStore(name), (value) => {
        result = value;
      });
    });

  /**
   * @param {string} name of a table
   * @returns {Promise<any[]>} all of it, in the order of ids
   */
  const everyOf = (name) =>
    transact(
      "readonly",
      (table, setResult) => {
        const all = table.getAll();
        all.onsuccess = () => setResult(all.result);
      },
      name,
    );

  return {
    isLasting: true,
    put: (generation) => transact("readwrite", (table) => void table.put(generation)),
    change: (id, edit) =>
      transact("readwrite", (table, setResult) => {
        const found = table.get(id);
        found.onsuccess = () => {
          const changed = found.result ? edit(found.result) : null;
          if (changed) table.put(changed);
          else table.delete(id);
          setResult(changed);
        };
      }),
    newest: (before, count, isWanted, after = "") =>
      transact("readonly", (table, setResult) => {
        /** @type {Generation[]} */
        const found = [];
        setResult(found);
        const range =
          before === null ? IDBKeyRange.lowerBound(after, true) : IDBKeyRange.bound(after, before, true, true);
        const opening = table.openCursor(range, "prev");
        opening.onsuccess = () => {
          const cursor = opening.result;
          if (!cursor || found.length === count) return;
          if (isWanted(cursor.value)) found.push(cursor.value);
          cursor.continue();
        };
      }),
    get: (id) =>
      transact("readonly", (table, setResult) => {
        const found = table.get(id);
        found.onsuccess = () => setResult(found.result ?? null);
      }),
    begin: (request) => transact("readwrite", (table) => void table.put(request), REQUESTS),
    end: (id) => transact("readwrite", (table) => void table.delete(id), REQUESTS),
    unended: () => everyOf(REQUESTS),
    collections: () => everyOf(COLLECTIONS),
    putCollection: (collection) => transact("readwrite", (table) => void table.put(collection), COLLECTIONS),
    removeCollection: (id) => transact("readwrite", (table) => void table.delete(id), COLLECTIONS),
    count: () =>
      transact("readonly", (table, setResult) => {
        const counting = table.count();
        counting.onsuccess = () => setResult(counting.result);
      }),
    clear: () => transact("readwrite", (table) => void table.clear()),
  };
}

/** @returns {Store} */
function memoryStore() {
  /** @type {Map<string, Generation>} */
  const generations = new Map();
  /** @type {Map<string, Collection>} */
  const collections = new Map();
  return {
    isLasting: false,
    put: async (generation) => void generations.set(generation.id, generation),
    change: async (id, edit) => {
      const found = generations.get(id);
      const changed = found ? edit(found) : null;
      if (changed) generations.set(id, changed);
      else generations.delete(id);
      return changed;
    },
    newest: async (before, count, isWanted, after = "") =>
      [...generations.values()]
        .sort((one, other) => (one.id < other.id ? 1 : -1))
        .filter(({ id }) => (before === null || id < before) && id > after)
        .filter(isWanted)
        .slice(0, count),
    get: async (id) => generations.get(id) ?? null,
    count: async () => generations.size,
    clear: async () => generations.clear(),
    // With the page they would be gone as well.
    begin: async () => {},
    end: async () => {},
    unended: async () => [],
    collections: async () => [...collections.values()],
    putCollection: async (collection) => void collections.set(collection.id, collection),
    removeCollection: async (id) => void collections.delete(id),
  };
}
