// The server as this page asks it: the key, errors in one line, and streams that go on where they broke.

const KEY = "llm42-key";
const TRIES = 4;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function ask(path, body, { signal, headers = {} } = {}) {
  const key = sessionStorage.getItem(KEY);
  const sent = { ...headers };
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers: sent,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
  });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Of a proxy in between: its status says enough.
  }
  throw new Refused(response.status, message);
}

/** JSON of a GET, or of a POST of `body`. Throws Refused, or TypeError where nobody answers. */
export const json = async (path, body, options) => (await ask(path, body, options)).json();

/** Events of a stream as {id, data}, as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const event = {};
      for (const line of text.slice(0, end).split("\n")) {
        const colon = line.indexOf(": ");
        event[line.slice(0, colon)] = line.slice(colon + 2);
      }
      text = text.slice(end + 2);
      yield event;
    }
  }
}

/**
 * Chunks of a stream of completions. A broken connection is taken up again by the last event's id, where the
 * events have ids. `breakAfter`: break it once on purpose behind so many events.
 */
export async function* stream(path, body, { signal, breakAfter = 0, onBreak = () => {} } = {}) {
  let last = null;
  let seen = 0;
  for (let tries = 0; ; tries++) {
    const cut = new AbortController();
    const either = AbortSignal.any([signal, cut.signal]);
    try {
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const response = await ask(path, { ...body, stream: true }, { signal: either, headers });
      for await (const { id, data } of events(response)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(0, chunk.error.message);
        if (id !== undefined) last = id;
        yield chunk;
        if (++seen === breakAfter && last !== null) {
          onBreak();
          cut.abort();
        }
      }
      throw new TypeError("the connection broke");
    } catch (error) {
      const again = !(error instanceof Refused) && last !== null && !signal.aborted && tries < TRIES;
      if (!again) throw error;
      if (!cut.signal.aborted) await new Promise((done) => setTimeout(done, 300 * 2 ** tries));
    } finally {
      cut.abort();
    }
  }
}
