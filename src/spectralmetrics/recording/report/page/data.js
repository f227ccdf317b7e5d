// From the compressed text in the page to strings, lists and typed arrays; write.py is the other side.

async function unpacked(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function readContent(bytes) {
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = new TextDecoder().decode(bytes.subarray(4, 4 + length));
  const arrays = bytes.subarray(4 + length);
  return JSON.parse(header, (key, value) => (value && value.array ? readArray(arrays, value) : value));
}

function readArray(bytes, { array, start, shape }) {
  const size = shape.reduce((product, length) => product * length, 1);
  const read = array === "floats" ? readFloats : readIntegers;
  return { shape, values: read(bytes, start, size, shape[shape.length - 1]) };
}

// The bytes of each number lie apart: all first ones, then all second ones, ...
function readFloats(bytes, start, size) {
  const found = new Uint8Array(size * 8);
  for (let place = 0; place < 8; place++) {
    const plane = start + place * size;
    for (let i = 0; i < size; i++) found[i * 8 + place] = bytes[plane + i];
  }
  return new Float64Array(found.buffer);
}

function readIntegers(bytes, start, size, epochs) {
  const found = new Int32Array(size);
  for (let i = 0, left = 0, last = 0; i < size; i++, left--) {
    if (left === 0) [left, last] = [epochs, 0];
    const at = start + i;
    const code = bytes[at] | (bytes[at + size] << 8) | (bytes[at + 2 * size] << 16) | (bytes[at + 3 * size] << 24);
    last += (code >>> 1) ^ -(code & 1);
    found[i] = last;
  }
  return found;
}

// The number at some place of an array of any shape.
function at(array, ...place) {
  let index = 0;
  for (let axis = 0; axis < place.length; axis++) index = index * array.shape[axis] + place[axis];
  return array.values[index];
}
