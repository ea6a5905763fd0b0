// What the server does now: /stats.json once a second while the page is seen, rates from differences.
import { json } from "./api.js";

const EVERY_MS = 1000;
const SHOWN = 60; // points of the curve
const at = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");

const percent = (part, all) => (all ? `${((100 * part) / all).toFixed(part * 10 < all && part ? 1 : 0)} %` : "–");
const committed = ({ certified, verified, ordinary }) => certified + verified + ordinary;

/** Tokens a second between two answers; null where the server was started anew. */
export function rate(before, now) {
  const seconds = now.uptime_s - before.uptime_s;
  const tokens = committed(now.tokens) - committed(before.tokens);
  return seconds > 0 && tokens >= 0 ? tokens / seconds : null;
}

function draw(curve) {
  const most = Math.max(1, ...curve);
  const points = curve.map((y, i) => `${((i + SHOWN - curve.length) * 120) / (SHOWN - 1)},${27 - (25 * y) / most}`);
  at("spark").firstElementChild.setAttribute("points", points.join(" "));
}

function show(now) {
  const { requests, tokens, drafts, kv } = now;
  at("flying").value = whole.format(requests.running + requests.waiting);
  at("waiting").textContent = requests.waiting ? `${whole.format(requests.waiting)} waiting` : "";
  at("kv").value = percent(kv.pages_in_use, kv.pages);
  at("kv-pages").textContent = `${whole.format(kv.pages_in_use)} of ${whole.format(kv.pages)} pages`;
  const used = kv.pages ? (100 * kv.pages_in_use) / kv.pages : 0;
  at("kv-bar").firstElementChild.style.width = `${used}%`;
  at("kv-bar").setAttribute("aria-valuenow", Math.round(used));
  const all = committed(tokens);
  at("tokens").value = whole.format(all);
  for (const origin of ["certified", "verified", "ordinary"]) {
    at(origin).value = percent(tokens[origin], all);
    at("origins").querySelector(`.${origin}`).style.width = `${all ? (100 * tokens[origin]) / all : 0}%`;
  }
  at("drafted").value = percent(drafts.accepted, all);
  at("rolled").value = percent(now.rollbacks.recomputed_tokens, all + now.rollbacks.recomputed_tokens);
}

function say(text) {
  if (at("state").textContent !== text) at("state").textContent = text; // a reader speaks each change
}

export function watch() {
  let before = null;
  const curve = [];
  const look = async () => {
    if (document.hidden) return;
    try {
      const now = await json("stats.json");
      show(now);
      const perSecond = before && rate(before, now);
      if (perSecond !== null) {
        curve.push(perSecond);
        if (curve.length > SHOWN) curve.shift();
        at("rate").value = whole.format(Math.round(perSecond));
        draw(curve);
      }
      before = now;
      say(now.draining ? "shutting down" : "ready");
    } catch {
      before = null;
      say("does not answer");
    }
  };
  const again = () => look().finally(() => setTimeout(again, EVERY_MS));
  again();
}
