// A chain of digests over tokens: SHA-256 of the digest before, the token id and the bits of its log-prob.
// crypto.subtle is not there over plain HTTP, and is asynchronous where it is.

const primes = [];
for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);

// The first 32 bits behind the point of a root: square for the state, cube for the rounds.
const fraction = (root) => Math.floor((root - Math.floor(root)) * 2 ** 32) >>> 0;
const START = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
const ROUND = primes.map((p) => fraction(Math.cbrt(p)));

const turn = (x, by) => (x >>> by) | (x << (32 - by));

function block(state, view, at) {
  const w = new Uint32Array(64);
  for (let i = 0; i < 64; i++) {
    if (i < 16) {
      w[i] = view.getUint32(at + 4 * i);
      continue;
    }
    const a = w[i - 15], b = w[i - 2];
    const low = turn(a, 7) ^ turn(a, 18) ^ (a >>> 3);
    const high = turn(b, 17) ^ turn(b, 19) ^ (b >>> 10);
    w[i] = w[i - 16] + low + w[i - 7] + high;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let i = 0; i < 64; i++) {
    const choice = (e & f) ^ (~e & g);
    const majority = (a & b) ^ (a & c) ^ (b & c);
    const x = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + choice + ROUND[i] + w[i]) | 0;
    const y = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + majority) | 0;
    [h, g, f, e, d, c, b, a] = [g, f, e, (d + x) | 0, c, b, a, (x + y) | 0];
  }
  return [a, b, c, d, e, f, g, h].map((value, i) => (state[i] + value) | 0);
}

/** @param {Uint8Array} bytes @returns {Uint8Array} 32 of them */
export function sha256(bytes) {
  const padded = new DataView(new ArrayBuffer(((bytes.length + 72) >> 6) << 6));
  new Uint8Array(padded.buffer).set(bytes);
  padded.setUint8(bytes.length, 0x80);
  padded.setUint32(padded.byteLength - 8, Math.floor(bytes.length / 2 ** 29));
  padded.setUint32(padded.byteLength - 4, bytes.length << 3);
  let state = START;
  for (let at = 0; at < padded.byteLength; at += 64) state = block(state, padded, at);
  const out = new DataView(new ArrayBuffer(32));
  state.forEach((word, i) => out.setInt32(4 * i, word));
  return new Uint8Array(out.buffer);
}

export const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");

/** Digests of the first token, the first two, and so on. */
export class Chain {
  #last = new Uint8Array(32);

  /** @param {number} token @param {number} logprob a float64, little-endian in the digest @returns {string} hex */
  add(token, logprob) {
    const data = new DataView(new ArrayBuffer(44));
    new Uint8Array(data.buffer).set(this.#last);
    data.setUint32(32, token, true);
    data.setFloat64(36, logprob, true);
    this.#last = sha256(new Uint8Array(data.buffer));
    return hex(this.#last);
  }
}
