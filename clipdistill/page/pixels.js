// Pictures to a tower's input as the student was trained on: Pillow's resampling, step for step, in its integers.
// A canvas resizes otherwise in each browser, and without a filter as wide as the reduction.

const BITS = 22;  // of a weight's fraction, as in Pillow's 8-bit resampling

const FILTERS = {
  bilinear: {support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x))},
  bicubic: {
    support: 2,
    weight(x) {
      const a = -0.5, t = Math.abs(x);
      if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
      return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
    },
  },
};

/** Which pixels each of the kept output pixels is made of, and by which weights: `count` of `full`, from `first` on. */
function weights(filter, whole, full, first, count) {
  const scale = whole / full, widening = Math.max(1, scale), support = filter.support * widening;
  return Array.from({length: count}, (_, place) => {
    const centre = (first + place + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - support + 0.5));
    const upTo = Math.min(whole, Math.trunc(centre + support + 0.5));
    const own = Array.from({length: upTo - from}, (_, x) => filter.weight((x + from - centre + 0.5) * (1 / widening)));
    const sum = own.reduce((total, one) => total + one, 0);
    const exact = own.map((one) => (sum ? one / sum : one) * (1 << BITS));
    return {from, by: Int32Array.from(exact, (one) => Math.trunc(one < 0 ? one - 0.5 : one + 0.5))};
  });
}

const clamped = (sum) => { const value = sum >> BITS; return value < 0 ? 0 : value > 255 ? 255 : value; };

/** From where on, and how far, the kept output pixels reach in the input. */
function reach(kept) {
  const first = kept[0].from, last = kept.at(-1);
  return {first, count: last.from + last.by.length - first};
}

/** Rows of a picture {data, width, height, step} made narrower or wider: `step` is its bytes a pixel, 3 or 4. */
function across({data, width, step}, columns, rows) {
  const out = new Uint8Array(rows.count * columns.length * 3);
  for (let y = 0, to = 0; y < rows.count; y++) {
    const line = (rows.first + y) * width * step;
    for (const {from, by} of columns) {
      let red = 1 << (BITS - 1), green = red, blue = red;
      for (let x = 0, at = line + from * step; x < by.length; x++, at += step) {
        red += data[at] * by[x]; green += data[at + 1] * by[x]; blue += data[at + 2] * by[x];
      }
      out[to++] = clamped(red); out[to++] = clamped(green); out[to++] = clamped(blue);
    }
  }
  return {data: out, width: columns.length, height: rows.count, step: 3};
}

/** Its columns made shorter or longer. */
function down({data, width, step}, rows, columns) {
  const out = new Uint8Array(rows.length * columns.count * 3), stride = width * step;
  let to = 0;
  for (const {from, by} of rows) {
    for (let x = 0; x < columns.count; x++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (BITS - 1);
        for (let y = 0, at = from * stride + (columns.first + x) * step + channel; y < by.length; y++, at += stride) sum += data[at] * by[y];
        out[to++] = clamped(sum);
      }
    }
  }
  return {data: out, width: columns.count, height: rows.length, step: 3};
}

const moved = (kept, first) => kept.map(({from, by}) => ({from: from - first, by}));

/** The part {top, left, height, width} of an RGBA picture {data, width, height} resized to `height` x `width`: RGB. */
function resized(picture, filter, height, width, part) {
  const rows = weights(filter, picture.height, height, part.top, part.height), tall = reach(rows);
  const columns = weights(filter, picture.width, width, part.left, part.width), wide = reach(columns);
  const source = {data: picture.data, width: picture.width, height: picture.height, step: 4};
  // Which pass comes first decides what is clipped between them. Pillow 13 begins with the height where that shrinks by
  // more than twice as many pixels as the width (its pull request 9549).
  if (height < picture.height && picture.height - height > 2 * (picture.width - width)) {
    return across(down(source, rows, wide), moved(columns, wide.first), {first: 0, count: rows.length}).data;
  }
  return down(across(source, columns, tall), moved(rows, tall.first), {first: 0, count: columns.length}).data;
}

const rounded = (value) => {  // as Python: halves to the even neighbour
  const near = Math.round(value);
  return near - value === 0.5 && near % 2 ? near - 1 : near;
};

/** Height and width that a picture is resized to before it is cut or padded. */
function target(picture, {size: [height, width], resize_mode: mode}) {
  if (mode === "squash") return [height, width];
  const fall = picture.height / height, breadth = picture.width / width;
  if (mode === "longest") {
    const ratio = Math.max(fall, breadth);
    return [Math.max(1, rounded(picture.height / ratio)), Math.max(1, rounded(picture.width / ratio))];
  }
  if (height !== width) {
    const ratio = Math.min(fall, breadth);
    return [rounded(picture.height / ratio), rounded(picture.width / ratio)];
  }
  if (picture.width <= picture.height) return [Math.trunc(height * picture.height / picture.width), height];
  return [height, Math.trunc(height * picture.width / picture.height)];
}

/** Where along one edge the kept part begins, how long it is, and how many pixels are padded before it. */
function kept(full, wanted) {
  if (full < wanted) return {first: 0, count: full, before: Math.floor((wanted - full) / 2)};
  return {first: rounded((full - wanted) / 2), count: wanted, before: 0};
}

/** An RGBA picture as the pixels that the tower sees: RGB, `size` high and wide. */
export function fitted(picture, preprocess) {
  const [height, width] = preprocess.size, [fullHeight, fullWidth] = target(picture, preprocess);
  const tall = kept(fullHeight, height), wide = kept(fullWidth, width);
  // open_clip gives no interpolation on to a shortest-edge resize that is not square
  const name = preprocess.resize_mode === "shortest" && height !== width ? "bicubic" : preprocess.interpolation;
  const part = {top: tall.first, left: wide.first, height: tall.count, width: wide.count};
  const pixels = resized(picture, FILTERS[name], fullHeight, fullWidth, part);
  if (tall.count === height && wide.count === width) return pixels;
  const padded = new Uint8Array(height * width * 3).fill(preprocess.resize_mode === "longest" ? preprocess.fill_color : 0);
  for (let y = 0; y < tall.count; y++) {
    padded.set(pixels.subarray(y * wide.count * 3, (y + 1) * wide.count * 3), ((y + tall.before) * width + wide.before) * 3);
  }
  return padded;
}

/** RGB pixels as float32 [3, height, width], normalised. */
export function normalised(pixels, {mean, std}) {
  const count = pixels.length / 3, values = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel++) {
    for (let place = 0; place < count; place++) {
      values[channel * count + place] = (pixels[place * 3 + channel] / 255 - mean[channel]) / std[channel];
    }
  }
  return values;
}

/** An encoded picture as upright RGBA over white, at most `most` pixels; throws where the browser cannot decode it. */
export async function decoded(blob, most) {
  const bitmap = await createImageBitmap(blob, {colorSpaceConversion: "none"});
  const {width, height} = bitmap;
  if (width * height > most) { bitmap.close(); throw new RangeError(`${width} x ${height} pixels; at most ${most} are read`); }
  const context = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}
