// An exported classifier in the browser: the network, its classes and its preprocessing are in one
// ONNX file of tools.export.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

const here = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.wasmPaths = here;
// more threads need headers that a plain static server does not send
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

// the largest image that Pillow opens; browsers give black ones beyond some size
const MOST_PIXELS = 178956970;

/** Open the bytes (ArrayBuffer) of an exported file: {facts, classify(file, count)}. */
export async function load(bytes) {
  const facts = metadata(new Uint8Array(bytes));
  if ((facts.channels ?? 3) !== 3 || facts.value_range)
    throw new Error("browsers read 8-bit colours only, this network needs other pixels");
  const session = await ort.InferenceSession.create(bytes);
  return {
    facts,
    /** The `count` most probable classes of an image file: [{name, share}], best first. */
    async classify(file, count) {
      const shape = [1, 3, ...sides(facts)];
      const images = new ort.Tensor("float32", await preprocess(file, facts), shape);
      const { logits } = await session.run({ images });
      const shares = (facts.multi_label ? sigmoid : softmax)(Array.from(logits.data));
      return shares
        .map((share, i) => ({ name: facts.classes[i], share }))
        .sort((a, b) => b.share - a.share)
        .slice(0, count);
    },
  };
}

/** Height and width of the network's images. */
export function sides({ input_size: size }) {
  return Array.isArray(size) ? size : [size, size];
}

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const shares = logits.map((logit) => Math.exp(logit - most));
  const sum = shares.reduce((a, b) => a + b);
  return shares.map((share) => share / sum);
}

function sigmoid(logits) {
  return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
}

/** Read the facts of tools.export out of an ONNX file, which ONNX Runtime does not give. */
export function metadata(bytes) {
  const text = new TextDecoder();
  for (const [field, property] of fields(bytes)) {
    if (field !== 14) continue; // ModelProto.metadata_props
    const entry = Object.fromEntries(fields(property));
    if (text.decode(entry[1]) !== "hornet") continue;
    const facts = JSON.parse(text.decode(entry[2]));
    if (facts.classes?.length && facts.input_size && facts.mean && facts.std) return facts;
  }
  throw new Error("this is damaged, or not a file of tools.export");
}

/** Yield [number, bytes] of the fields with a length in a message of Protocol Buffers. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new Error("this is not an ONNX file");
      const byte = bytes[at++];
      value += (byte % 128) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const type = key % 8;
    if (type === 2) {
      const length = varint();
      yield [Math.floor(key / 8), bytes.subarray(at, at + length)];
      at += length;
    } else if (type === 0) varint();
    else if (type === 5 || type === 1) at += type === 5 ? 4 : 8;
    else throw new Error("this is not an ONNX file");
  }
}

/** Decode, resize and crop an image as inference/preprocessing.py does: Float32Array (3, H, W). */
export async function preprocess(file, facts) {
  const { mean, std, crop_pct, background } = facts;
  const [high, wide] = sides(facts);
  // pixels as they are in the file, except that browsers always turn images as their EXIF says
  const options = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const image = await createImageBitmap(file, options)
    .catch(() => { throw new Error("the browser cannot read this image"); });
  if (image.width * image.height > MOST_PIXELS)
    throw new Error(`${image.width} x ${image.height} pixels are too many`);
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  if (background) {
    context.fillStyle = background;
    context.fillRect(0, 0, image.width, image.height);
  }
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  let [width, height] = [wide, high]; // the whole image, warped to this size
  if (crop_pct && wide === high) { // or the middle of an image whose short side is S / crop_pct
    const short = Math.floor(high / crop_pct);
    const shortest = Math.min(image.width, image.height);
    width = Math.floor((short * image.width) / shortest);
    height = Math.floor((short * image.height) / shortest);
  } else if (crop_pct) { // or of the smallest one that covers the size / crop_pct
    const covered = [Math.floor(wide / crop_pct), Math.floor(high / crop_pct)];
    const ratio = Math.min(image.width / covered[0], image.height / covered[1]);
    width = halfEven(image.width / ratio);
    height = halfEven(image.height / ratio);
  }
  const [left, top] = [halfEven((width - wide) / 2), halfEven((height - high) / 2)];
  const resized = resize(pixels, width, height);
  const planes = new Float32Array(3 * high * wide);
  for (let channel = 0, i = 0; channel < 3; channel++)
    for (let y = top; y < top + high; y++)
      for (let x = left; x < left + wide; x++)
        planes[i++] = (resized[4 * (y * width + x) + channel] / 255 - mean[channel]) / std[channel];
  return planes;
}

/** Round as Python does: halves to even numbers. */
function halfEven(value) {
  const rounded = Math.round(value);
  return value % 1 === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** Resize RGBA pixels as Pillow's bicubic filter does: along the width, then the height. */
export function resize({ data, width, height }, newWidth, newHeight) {
  const wide = along(data, width, newWidth, 4, height, 4 * width, 4 * newWidth);
  return along(wide, height, newHeight, 4 * newWidth, newWidth, 4, 4);
}

/** Resize one axis: lines of `size` pixels, `step` apart, become lines of `newSize` pixels. */
function along(data, size, newSize, step, lines, lineStep, newLineStep) {
  const result = new Uint8ClampedArray(4 * newSize * lines); // rounds and clamps
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  for (let i = 0; i < newSize; i++) {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const last = Math.min(size, Math.trunc(center + 2 * stretch + 0.5));
    const weights = [];
    for (let j = first; j < last; j++) weights.push(cubic((j - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b);
    for (let line = 0; line < lines; line++)
      for (let channel = 0; channel < 4; channel++) {
        let value = 0;
        let at = line * lineStep + first * step + channel;
        for (const weight of weights) {
          value += weight * data[at];
          at += step;
        }
        result[line * newLineStep + i * step + channel] = value / sum;
      }
  }
  return result;
}

/** Keys' cubic kernel with a = -0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}
