// The table of runs: a row each, a cell a token, coloured by the digest up to there.

const at = (id) => document.getElementById(id);
const made = (name, text = "", className = "") => {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return element;
};
const short = (digest) => digest.slice(0, 12);

let runs = [];
let width = 1; // columns: as many tokens as were asked for, in the end as many as there are

/** Empty rows for `count` runs. A run has its tokens, its text, and the first position that `differs`. */
export function begin(count, length, noise) {
  runs = Array.from({ length: count }, (_, index) => ({ index, tokens: [], text: "", differs: null, receipt: null }));
  at("rows").replaceChildren(...runs.map((run) => row(run, run.index ? `${noise} others` : "nobody")));
  at("text").replaceChildren();
  at("results").hidden = false;
  columns(length);
  choose(1);
  return runs;
}

function row(run, amid) {
  const tr = made("tr");
  const name = made("th", String(run.index + 1));
  name.scope = "row";
  const strip = made("td");
  run.strip = made("div", "", "weave");
  run.strip.setAttribute("aria-hidden", "true"); // the slider below reads it out
  strip.append(run.strip);
  run.count = made("td", "0", "number");
  run.digest = made("td", "", "digest");
  run.row = tr;
  tr.append(name, made("td", amid), strip, run.count, run.digest);
  return tr;
}

function columns(count) {
  width = Math.max(1, count);
  for (const run of runs) run.strip.style.setProperty("--tokens", width);
  at("at").max = width;
}

/** The next token of a run. */
export function token(run, one) {
  const position = run.tokens.push(one) - 1;
  const cell = made("i");
  cell.style.setProperty("--hue", String((parseInt(one.digest.slice(0, 4), 16) * 360) / 65536));
  const other = runs[0].tokens[position];
  if (other?.digest !== one.digest) {
    run.differs ??= position;
    run.row.classList.add("differs");
    cell.className = "wrong";
  }
  run.strip.append(cell);
  run.count.textContent = String(position + 1);
  run.digest.textContent = short(one.digest);
  if (run.index === 0) at("text").append(made("span", one.text));
}

/** A run has ended; `rest` is text that belongs to no token of its own. */
export function finish(run, rest) {
  run.done = true;
  if (run.index === 0) at("text").append(made("span", rest));
  if (runs.every((each) => each.done)) columns(Math.max(...runs.map((each) => each.tokens.length)));
  if (run.tokens.length < runs[0].tokens.length) run.differs ??= run.tokens.length;
  choose(Number(at("at").value));
}

/** Show column `place`, counted from 1. */
function choose(place) {
  place = Math.min(place, width);
  at("at").value = String(place);
  at("at-number").value = String(place);
  for (const chosen of document.querySelectorAll(".weave .chosen")) chosen.classList.remove("chosen");
  for (const run of runs) run.strip.children[place - 1]?.classList.add("chosen");
  [...at("text").children].forEach((span, i) => {
    const name = i === place - 1 ? "MARK" : "SPAN";
    if (span.nodeName !== name) span.replaceWith(made(name, span.textContent));
  });
  const text = describe(place);
  at("at").setAttribute("aria-valuetext", text.map((part) => part.textContent).join(""));
  at("at-detail").replaceChildren(...text);
}

/** What the runs have at a column: parts of a sentence. */
function describe(place) {
  const groups = new Map(); // digest → runs
  for (const run of runs) {
    const one = run.tokens[place - 1];
    if (one) groups.set(one.digest, [...(groups.get(one.digest) ?? []), run]);
  }
  const parts = [...groups].map(([digest, same]) => {
    const { name, logprob } = same[0].tokens[place - 1];
    const part = made("span");
    const who = same.length === runs.length ? `all ${runs.length} runs` : `run ${same.map((run) => run.index + 1).join(", ")}`;
    part.append(made("code", JSON.stringify(name)), `, log-probability `, made("code", String(logprob)), `, digest `,
      made("code", digest.slice(0, 24)), ` in ${who}. `);
    return part;
  });
  return parts.length ? parts : [made("span", "No run has come so far yet.")];
}

at("at").addEventListener("input", () => choose(Number(at("at").value)));
at("rows").addEventListener("click", ({ target }) => {
  if (target.parentElement?.className === "weave") choose([...target.parentElement.children].indexOf(target) + 1);
});
