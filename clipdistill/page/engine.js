// The search without a service: the student's int8 towers by transformers.js, and int8 vectors compared one by one.

import {AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, Tensor, env} from "./vendor/transformers.min.js";
import {decoded, fitted, normalised} from "./pixels.js";

const HERE = new URL("./", import.meta.url).href;

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL("./", import.meta.url).pathname;  // a whole address would count as remote
env.useBrowserCache = false;  // a new bundle at this address must not meet the old one's towers; HTTP caches are asked
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = {
  mjs: `${HERE}vendor/ort-wasm-simd-threaded.js`, wasm: `${HERE}vendor/ort-wasm-simd-threaded.wasm`,
};
if (!globalThis.crossOriginIsolated) env.backends.onnx.wasm.numThreads = 1;  // no shared memory between threads

/** What is told to whoever searches: the page shows both lines. */
class Refusal extends Error {
  constructor(title, detail) { super(detail); this.title = title; }
}

async function fetched(path, as, options = {}) {
  let response;
  try { response = await fetch(HERE + path, options); } catch (fault) {
    throw new Refusal("The search could not be loaded", `${path}: ${fault.message}. Check the connection, then load this page again.`);
  }
  if (!response.ok) throw new Refusal("The search could not be loaded", `${path}: the host answers ${response.status}. Every file of the bundle must be at this address.`);
  return response[as]();
}

/** Load the bundle that this module lies in. */
export async function open() {
  const facts = await fetched("bundle.json", "json", {cache: "no-cache"});
  const [keys, codes, scales, ...towers] = await Promise.all([
    fetched(`${facts.data}/keys.json`, "json"),
    fetched(`${facts.data}/vectors.bin`, "arrayBuffer"),
    fetched(`${facts.data}/scales.bin`, "arrayBuffer"),
    ...loaded(facts),
  ]);
  return new Engine(facts, keys, new Int8Array(codes), new Float32Array(scales), towers);
}

/** The tokenizer and the towers. */
function loaded(facts) {
  const options = {dtype: "q8", device: "wasm", local_files_only: true};
  const parts = [AutoTokenizer.from_pretrained(facts.data), CLIPTextModelWithProjection.from_pretrained(facts.data, options)];
  if (facts.preprocess) parts.push(CLIPVisionModelWithProjection.from_pretrained(facts.data, options));
  return parts.map((part) => part.catch((fault) => {
    throw new Refusal("The search could not be loaded", `The towers: ${fault.message}`);
  }));
}

class Engine {
  #facts; #keys; #codes; #scales; #tokenizer; #text; #vision;

  constructor(facts, keys, codes, scales, [tokenizer, text, vision = null]) {
    const {dim, vectors} = facts;
    if (keys.length !== vectors || codes.length !== vectors * dim || scales.length !== vectors) {
      throw new Refusal("The search could not be loaded", "Its files are not of one bundle: copy the whole folder again.");
    }
    [this.#facts, this.#keys, this.#codes, this.#scales] = [facts, keys, codes, scales];
    [this.#tokenizer, this.#text, this.#vision] = [tokenizer, text, vision];
  }

  /** What is searched, in the service's words. */
  info() {
    const {name, dim, vectors} = this.#facts;
    return {models: [{name, dim, vectors, pictures: this.#vision !== null}]};
  }

  /** The `k` nearest pictures of {text} or {blob}, in the service's words. */
  async search(query, k, signal) {
    const started = performance.now();
    const vector = query.blob ? await this.embedPicture(query.blob) : await this.embedText(query.text);
    signal?.throwIfAborted();
    const encoded = performance.now(), hits = this.nearest(vector, k);
    const {name} = this.#facts, latency_ms = {encode: encoded - started, search: performance.now() - encoded};
    return {model: name, hits, latency_ms, compared: null};
  }

  /** A text as the tower is given it: one that is too long loses its last pieces, never its end token. */
  tokens(text) {
    const ids = this.#tokenizer.encode(text.toWellFormed()), most = this.#facts.context_length;  // a lone surrogate is no character
    const kept = ids.length > most ? [...ids.slice(0, most - 1), ids.at(-1)] : ids, shape = [1, kept.length];
    return {
      input_ids: new Tensor("int64", BigInt64Array.from(kept, BigInt), shape),
      attention_mask: new Tensor("int64", new BigInt64Array(kept.length).fill(1n), shape),
    };
  }

  /** A text's embedding: float32 of unit length. */
  async embedText(text) {
    const limit = this.#facts.text_chars;
    if (text.length > limit) throw new Refusal("Too large", `The text has ${text.length} characters; at most ${limit} are read.`);
    return (await this.#text(this.tokens(text))).text_embeds.data;
  }

  /** A picture's embedding: float32 of unit length. */
  async embedPicture(blob) {
    if (!this.#vision) throw new Refusal("That cannot be searched", "This model reads texts alone.");
    let picture;
    try { picture = await decoded(blob, this.#facts.max_pixels); } catch (fault) {
      if (fault instanceof RangeError) throw new Refusal("Too large", `The picture has ${fault.message}.`);
      throw new Refusal("That cannot be searched", "This is not a picture that the browser can read.");
    }
    const {preprocess} = this.#facts, values = normalised(fitted(picture, preprocess), preprocess);
    const pixel_values = new Tensor("float32", values, [1, 3, ...preprocess.size]);
    return (await this.#vision({pixel_values})).image_embeds.data;
  }

  /** The `k` rows of the greatest inner product; of equal ones the first. */
  nearest(vector, k) {
    const scores = compared(vector, this.#codes, this.#scales);
    const best = top(scores, Math.min(k, scores.length));
    return best.map((row, place) => ({
      rank: place + 1, key: this.#keys[row], score: scores[row],
      item: this.#facts.thumbnails ? `/${this.#facts.data}/thumbs/${row}.webp` : null,
    }));
  }
}

/** The inner products of a vector with rows of int8 `codes`, each times its row's scale. */
function compared(vector, codes, scales) {
  const dim = vector.length, query = Float32Array.from(vector), scores = new Float32Array(scales.length);
  for (let row = 0, at = 0; row < scores.length; row++) {
    let a = 0, b = 0, c = 0, d = 0, x = 0;
    for (; x + 3 < dim; x += 4, at += 4) {
      a += query[x] * codes[at]; b += query[x + 1] * codes[at + 1];
      c += query[x + 2] * codes[at + 2]; d += query[x + 3] * codes[at + 3];
    }
    for (; x < dim; x++, at++) a += query[x] * codes[at];
    scores[row] = (a + b + c + d) * scales[row];
  }
  return scores;
}

/** The places of the `k` greatest scores, best first, equal ones in order. */
function top(scores, k) {
  const best = [];
  for (let row = 0; row < scores.length; row++) {
    if (best.length === k && scores[row] <= scores[best[k - 1]]) continue;
    let low = 0, high = best.length;
    while (low < high) { const half = (low + high) >> 1; if (scores[best[half]] >= scores[row]) low = half + 1; else high = half; }
    best.splice(low, 0, row);
    if (best.length > k) best.pop();
  }
  return best;
}
