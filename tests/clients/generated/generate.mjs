// Writes api.d.ts from openapi.json. A file is a Blob: https://openapi-ts.dev/node#example-blob-types

import { readFile, writeFile } from "node:fs/promises";
import openapiTS, { astToString } from "openapi-typescript";
import ts from "typescript";

const blob = ts.factory.createTypeReferenceNode(ts.factory.createIdentifier("Blob"));
const types = await openapiTS(JSON.parse(await readFile("openapi.json", "utf8")), {
  defaultNonNullable: false, // what has a default may be left out of a request
  transform: (schema) => (schema.format === "binary" ? blob : undefined),
});
await writeFile("api.d.ts", astToString(types));
