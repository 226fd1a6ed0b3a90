// OpenAI's client for node, unmodified, against the server at argv[2]; prints what test_node.py checks as one JSON line.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const prompt = "빨강 바탕에 파랑 네모";
const found = {};

const model = (await client.models.list()).data[0];
found.model = model.id;

const made = await client.images.generate({ prompt, n: 2, model: model.id, seed: 7, candidates: 3, size: "64x64" });
found.images = made.data.map((image) => image.b64_json);
found.seeds = made.data.map((image) => image.seed);
found.size = made.size;

found.events = [];
for await (const event of await client.images.generate({ prompt, seed: 7, candidates: 3, stream: true, partial_images: 1 }))
  found.events.push(event.type);

const file = await toFile(Buffer.from(found.images[0], "base64"), "image.png", { type: "image/png" });
const edited = await client.images.edit({ image: file, prompt, seed: 3, keep_rows: 4, candidates: 1 });
found.edited = edited.data[0].b64_json;

// Asks for base64 by itself, as its Python sister does.
found.embedding = (await client.embeddings.create({ model: model.id, input: prompt })).data[0].embedding;

try {
  await client.images.generate({ prompt, n: 11 });
} catch (error) {
  found.error = { type: error.constructor.name, status: error.status, code: error.code, param: error.param };
}
console.log(JSON.stringify(found));
