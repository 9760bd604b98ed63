// What the clients of npm share: as in ../python/checks.py.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

export const url = process.env.CLIENTS_URL;
export const base = `${url}/v1`;
export const key = process.env.CLIENTS_KEY;
export const model = process.env.CLIENTS_MODEL;
export const filesUrl = process.env.CLIENTS_FILES_URL;

export const soundPath = join(process.env.CLIENTS_DEMO, "sound.wav");
export const picture = readFileSync(join(process.env.CLIENTS_DEMO, "picture.png"));
export const sound = readFileSync(soundPath);
export const pictureUrl = `data:image/png;base64,${picture.toString("base64")}`;

export const sum = { ask: "What is 3 plus 4?", answer: "3 plus 4 is 7." };
export const see = { ask: "What is in the picture?", answer: "A red circle, a yellow star and a blue square." };
export const count = {
  ask: "How many shapes are there?",
  answer: "A red circle and a yellow star and a blue square: three shapes.",
};
export const hear = { ask: "What do you hear?", answer: "Three high beeps." };

const digit = { type: "integer", minimum: 0, maximum: 9 };
const object = properties =>
  ({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
export const addSchema = object({ a: digit, b: digit });
const stop = { $ref: "#/$defs/Stop" };
export const tripSchema = {
  ...object({ home: stop, stops: { type: "array", items: stop, maxItems: 2 } }),
  $defs: { Stop: object({ city: { type: "string", enum: ["Rome", "Oslo"] }, nights: digit }) },
};

const isDigit = value => Number.isInteger(value) && value >= 0 && value <= 9;
const read = given => (typeof given === "string" ? JSON.parse(given) : given);
export const isSum = given => isDigit(read(given).a) && isDigit(read(given).b);
export function isTrip(given) {
  const { home, stops } = read(given);
  return [home, ...stops].every(stop => ["Rome", "Oslo"].includes(stop.city) && isDigit(stop.nights));
}

export async function collect(stream) {
  const all = [];
  for await (const each of stream) all.push(each);
  return all;
}

export const versionOf = packageName =>
  createRequire(import.meta.url)(`./node_modules/${packageName}/package.json`).version;

// The row of one client in the table: `check` runs a check and prints its result, `cannot` prints why there is none.
export function checksOf(client, version) {
  const print = (feature, result, why = "") =>
    console.log(JSON.stringify({ client, version, feature, result, why: why.slice(0, 400) }));
  return {
    async check(feature, run) {
      try {
        await run();
        print(feature, "ok");
      } catch (error) {
        const place = String(error.stack).split("\n").find(line => /^(?!.*node_modules).*\.mjs:\d+/.test(line)) ?? "";
        print(feature, "failed", `${error.name}: ${error.message} ${place.trim()}`);
      }
    },
    cannot: (feature, why) => print(feature, "none", why),
  };
}
