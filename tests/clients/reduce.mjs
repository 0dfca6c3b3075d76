// Folds lists of events with web_demo/client.js: JSON in on stdin, JSON out on stdout.
import { text } from "node:stream/consumers";
import { EMPTY, reduce } from "../../web_demo/client.js";

const cases = JSON.parse(await text(process.stdin));
const folded = cases.map(({ state, events }) => events.reduce(reduce, { ...EMPTY, ...state }));
process.stdout.write(JSON.stringify(folded));
