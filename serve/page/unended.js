/**
 * Requests outlive their page: each is kept, with its seed, until it has ended. A page that was reloaded goes on with its
 * own; what a closed one left is offered, to be generated again with the same seed.
 *
 * A lock by the request's id says whether a page is still at it. Browsers free it however the page ends.
 */

const LOCK = "kodalle.request.";
const RELOAD_WITHIN_MS = 10 * 60_000;

/**
 * @typedef {import("./queue.js").Job} Job
 *
 * @typedef {object} Unended
 * @property {(job: Job) => Promise<void>} note the job's state: kept while it runs, forgotten once it has ended
 * @property {(id: string) => Promise<void>} forget
 * @property {(restore: (stored: import("./store.js").StoredRequest, goesOn: boolean) => void) => Promise<void>} take over
 *   what no page is at
 */

/**
 * @param {import("./store.js").Store} store
 * @returns {Unended}
 */
export function createUnended(store) {
  /** @type {Map<string, () => void>} by id, what frees its lock */
  const held = new Map();

  /**
   * @param {string} id
   * @returns {Promise<boolean>} whether this page now holds it
   */
  const hold = (id) =>
    new Promise((resolve) => {
      if (!navigator.locks) return resolve(true);
      void navigator.locks.request(LOCK + id, { ifAvailable: true }, (lock) => {
        resolve(lock !== null);
        return lock ? new Promise((free) => void held.set(id, () => free(undefined))) : undefined;
      });
    });
  // One after the other, so that what ends at once is not kept after all.
  let last = Promise.resolve();
  /** @param {() => Promise<void>} act */
  const inTurn = (act) => {
    last = last.then(act).catch((error) => console.warn("a request that goes on is not kept:", error));
    return last;
  };
  /** @param {string} id */
  const forget = (id) =>
    inTurn(async () => {
      held.get(id)?.();
      held.delete(id);
      await store.end(id);
    });

  return {
    forget,
    note: async ({ id, createdMs, request, state }) => {
      if (["done", "failed", "cancelled"].includes(state)) await forget(id);
      else if (state === "waiting")
        await inTurn(async () => {
          if (!held.has(id) && (await hold(id))) await store.begin({ id, createdMs, request });
        });
    },
    take: async (restore) => {
      const [entry] = /** @type {PerformanceNavigationTiming[]} */ (performance.getEntriesByType("navigation"));
      for (const stored of await store.unended()) {
        if (!(await hold(stored.id))) continue;
        restore(stored, entry?.type === "reload" && Date.now() - stored.createdMs < RELOAD_WITHIN_MS);
      }
    },
  };
}
