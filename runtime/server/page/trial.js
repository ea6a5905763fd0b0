// One prompt, many times: the first run alone, the others amid requests that share their batches.
import { json, Refused, stream } from "./api.js";
import { Chain } from "./digest.js";
import { showReceipts } from "./receipt.js";
import { begin, finish, token } from "./weave.js";

const at = (id) => document.getElementById(id);
const number = (id) => at(id).valueAsNumber;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Browsers open six connections to a server: one is for the numbers above.
const RUN_STREAMS = 3;
const NOISE_REQUESTS = 2;
const COMPLETIONS = "v1/completions";
const SUBJECTS = ["Rivers", "A recipe for bread", "The history of glass", "Why the sky is blue", "Bridges",
  "Letters to a friend", "How clocks work", "Seven birds of the north", "A short walk in the rain"];

let model = null;
let running = null; // the AbortController of what runs

function verdict(kind, text) {
  at("verdict").dataset.kind = kind;
  at("verdict").textContent = text;
}

/** What the form asks for. */
function asked() {
  return {
    count: number("runs"),
    noise: number("noise"),
    length: number("length"),
    deterministic: at("deterministic").checked,
    breaks: at("break").checked && at("deterministic").checked,
    sampling: { temperature: number("temperature"), seed: number("seed") },
  };
}

async function promptIds(signal) {
  const text = at("prompt").value;
  const body = at("as-chat").checked ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  return (await json("tokenize", body, { signal })).tokens;
}

/** `runs` in one stream, each with its chain of digests. `counts.breaks` is of connections broken on purpose. */
async function follow(runs, ids, wish, counts, signal) {
  const body = {
    model: model.id,
    prompt: runs.map(() => ids),
    max_tokens: wish.length,
    logprobs: 0,
    return_token_ids: true,
    fresh: true, // equal requests in flight would be computed once
    deterministic: wish.deterministic,
    receipt: wish.deterministic,
    ...wish.sampling,
  };
  const chains = runs.map(() => new Chain());
  const breakAfter = wish.breaks ? Math.max(1, Math.floor((runs.length * wish.length) / 3)) : 0;
  const onBreak = () => counts.breaks++;
  for await (const { choices } of stream(COMPLETIONS, body, { signal, breakAfter, onBreak })) {
    for (const choice of choices) {
      const run = runs[choice.index];
      const { logprobs } = choice;
      run.text += choice.text;
      for (let i = 0; logprobs && i < logprobs.tokens.length; i++) {
        const [id, logprob] = [choice.token_ids[i], logprobs.token_logprobs[i]];
        const digest = chains[choice.index].add(id, logprob);
        token(run, { id, logprob, digest, name: logprobs.tokens[i], text: choice.text });
      }
      if (choice.finish_reason) {
        run.receipt = choice.receipt ?? null;
        finish(run, choice.text);
      }
    }
  }
}

/** Ordinary requests, `together` at a time, until `signal`. */
async function noise(together, wish, counts, signal) {
  while (together && !signal.aborted) {
    const prompt = Array.from({ length: together }, () => {
      const subject = SUBJECTS[Math.floor(Math.random() * SUBJECTS.length)];
      return `${subject}. `.repeat(1 + Math.floor(Math.random() * 12));
    });
    const max_tokens = 8 + Math.floor(Math.random() * wish.length);
    const body = { model: model.id, prompt, max_tokens, deterministic: false };
    counts.noise += together;
    try {
      await json(COMPLETIONS, body, { signal });
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Refused) || error.status !== 429) throw error;
      await pause(1000); // the queue is full: noise enough
    }
  }
}

async function amidNoise(runs, ids, wish, counts, signal) {
  const quiet = new AbortController();
  const loud = AbortSignal.any([signal, quiet.signal]);
  const shares = Array.from({ length: NOISE_REQUESTS }, (_, i) => Math.floor((wish.noise + i) / NOISE_REQUESTS));
  const noises = Promise.all(shares.map((share) => noise(share, wish, counts, loud)));
  const groups = Array.from({ length: RUN_STREAMS }, (_, i) => runs.filter((_, j) => j % RUN_STREAMS === i));
  const follows = groups
    .filter((group) => group.length)
    .map((group, i) => pause(100 + 250 * i).then(() => follow(group, ids, wish, counts, signal)));
  try {
    await Promise.race([Promise.all(follows), noises.then(() => Promise.all(follows))]);
  } finally {
    quiet.abort();
    await Promise.allSettled([...follows, noises]);
  }
}

const several = (count, one, many) => `${count} ${count === 1 ? one : many}`;

function conclude(runs, counts) {
  const ends = runs.map((run) => run.tokens.at(-1)?.digest ?? "");
  const first = runs[0].tokens.length;
  const breaks = counts.breaks ? `, over ${several(counts.breaks, "broken connection", "broken connections")}` : "";
  const amid = `amid ${several(counts.noise, "other request", "other requests")}${breaks}`;
  if (new Set(ends).size === 1) {
    const what = `one digest over ${several(first, "token", "tokens")} and the bits of their log-probabilities`;
    verdict("same", `${runs.length} runs agree: ${what}, ${amid}.`);
    return;
  }
  const place = Math.min(...runs.map((run) => run.differs ?? Infinity)) + 1;
  verdict("differ", `${new Set(ends).size} digests in ${runs.length} runs, ${amid}: they differ from token ${place} on.`);
}

async function run() {
  const wish = asked();
  const counts = { noise: 0, breaks: 0 };
  running = new AbortController();
  const { signal } = running;
  const runs = begin(wish.count, wish.length, wish.noise);
  showReceipts([]);
  verdict("idle", "The first run goes alone.");
  const ids = await promptIds(signal);
  await follow(runs.slice(0, 1), ids, wish, counts, signal);
  verdict("idle", `${several(wish.count - 1, "run", "runs")} amid ${wish.noise} requests at a time.`);
  await amidNoise(runs.slice(1), ids, wish, counts, signal);
  conclude(runs, counts);
  showReceipts(runs.map((one) => one.receipt));
}

async function submit(event) {
  event.preventDefault();
  at("go").disabled = true;
  at("stop").disabled = false;
  try {
    await run();
  } catch (error) {
    if (running.signal.aborted) verdict("idle", "Stopped.");
    else verdict("failed", error instanceof Refused ? error.message : `The server does not answer: ${error.message}`);
  } finally {
    running.abort();
    at("go").disabled = false;
    at("stop").disabled = true;
  }
}

/** Once the server is known. */
export async function start(served) {
  if (model === null) {
    at("ask").addEventListener("submit", submit);
    at("stop").addEventListener("click", () => running?.abort());
    at("deterministic").addEventListener("change", () => (at("break").disabled = !at("deterministic").checked));
  }
  model = served;
  try {
    await json("tokenize", { messages: [{ role: "user", content: "x" }] });
  } catch {
    at("as-chat").checked = false; // the model has no template for chats
    at("as-chat").disabled = true;
  }
  at("go").disabled = false;
}
