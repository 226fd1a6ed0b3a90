/**
 * Server-sent events from a fetch: EventSource can neither POST nor send a key.
 *
 * Source: WHATWG HTML, "Server-sent events", parsing an event stream. `id` and `retry` are ignored.
 */

/**
 * @param {ReadableStream<Uint8Array>} stream the body of an answer of type text/event-stream
 * @returns {AsyncGenerator<{event: string, data: string}>} whole events; one that a broken connection cut is dropped
 */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let event = "";
  /** @type {string[]} */
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const [lines, left] = splitLines(rest + decoder.decode(value, { stream: true }));
      rest = left;
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event: event || "message", data: data.join("\n") };
          event = "";
          data = [];
        } else {
          const [field, text] = splitField(line);
          if (field === "event") event = text;
          else if (field === "data") data.push(text);
        }
      }
    }
  } finally {
    // Also when the reader of the events stops early: the server must see the hang-up.
    await reader.cancel().catch(() => {});
  }
}

/**
 * @param {string} text
 * @returns {[string[], string]} whole lines, and what comes after the last of them
 */
function splitLines(text) {
  // A carriage return at the very end may be half of a line end: it waits for what follows.
  const held = text.endsWith("\r") ? "\r" : "";
  const lines = (held ? text.slice(0, -1) : text).split(/\r\n|\n|\r/);
  return [lines.slice(0, -1), lines[lines.length - 1] + held];
}

/**
 * @param {string} line
 * @returns {[string, string]} field and value; a comment has the field ""
 */
function splitField(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const value = line.slice(colon + 1);
  return [line.slice(0, colon), value.startsWith(" ") ? value.slice(1) : value];
}
