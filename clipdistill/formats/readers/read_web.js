// Embed probes in the bundle's own page: by its engine, and pictures also as transformers.js prepares them itself.

import {open} from "/engine.js";
import {AutoImageProcessor, CLIPVisionModelWithProjection, RawImage, env} from "/vendor/transformers.min.js";

const TOP = 10;

const told = (path, value) => fetch(path, {method: "POST", body: JSON.stringify(value)});

async function timed(times, work) {
  const started = performance.now(), found = await work();
  times.push(performance.now() - started);
  return found;
}

const median = (times) => [...times].sort((one, other) => one - other)[Math.floor(times.length / 2)] ?? 0;

async function pictureAt(row) { return (await fetch(`/picture/${row}`)).blob(); }

/** Pictures that transformers.js resizes, crops and normalises by the bundle's preprocessor_config.json. */
async function prepared(data, rows) {
  const options = {dtype: "q8", device: "wasm"};
  const processor = await AutoImageProcessor.from_pretrained(data), vision = await CLIPVisionModelWithProjection.from_pretrained(data, options);
  const found = [];
  for (const row of rows) {
    const {pixel_values} = await processor(await RawImage.fromBlob(await pictureAt(row)));
    found.push(Array.from((await vision({pixel_values})).image_embeds.data));
  }
  return found;
}

async function main() {
  const engine = await open();
  const {texts, pictures, data, processor} = await (await fetch("/probes")).json();
  engine.nearest(await engine.embedText(texts[0]), TOP);
  const first = performance.now();  // since this page was opened
  const encode = [], search = [], found = {ids: [], text: [], top: [], image: [], prepared: []};
  for (const text of texts) {
    found.ids.push(Array.from(engine.tokens(text).input_ids.data, Number));
    const vector = await timed(encode, () => engine.embedText(text));
    found.text.push(Array.from(vector));
    found.top.push((await timed(search, () => engine.nearest(vector, TOP))).map((hit) => hit.key));
  }
  for (const row of pictures) found.image.push(Array.from(await engine.embedPicture(await pictureAt(row))));
  if (processor) found.prepared = await prepared(data, pictures);
  found.figures = {first_result_s: first / 1000, text_ms: median(encode), search_ms: median(search)};
  found.version = env.version;
  await told("/done", found);
}

main().catch((fault) => told("/failed", `${fault.title ?? fault.name}: ${fault.message}`));
