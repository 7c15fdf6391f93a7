// Runs llama.cpp (the npm package node-llama-cpp) on a GGUF file: tokens and next-token logits of
// some texts, and one answer in chat.
// node llama_cpp.mjs FOLDER FILE.gguf OUT.json '{"texts": [...], "chat": "..."}'
// FOLDER: where node-llama-cpp was installed; node_modules is in it.
import {writeFileSync} from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [folder, file, out, request] = process.argv.slice(2);
const entry = path.join(path.resolve(folder), "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaChatSession, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const {texts, chat} = JSON.parse(request);

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 2});
const model = await llama.loadModel({modelPath: path.resolve(file)});
const context = await model.createContext({contextSize: 512, threads: 2});
const sequence = context.getSequence();

const results = [];
for (const text of texts) {
    const tokens = model.tokenize(text, false);
    await sequence.clearHistory();
    const items = [...tokens];
    items[items.length - 1] = [items[items.length - 1], {generateNext: {logits: true}}];
    const answers = await sequence.controlledEvaluate(items);
    const next = answers[answers.length - 1].next;
    const logits = [...next.logits.entries()].sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
    results.push({tokens: [...tokens], logits});
}
let answer = null;
if (chat != null) {
    await sequence.clearHistory();
    const session = new LlamaChatSession({contextSequence: sequence});
    answer = await session.prompt(chat, {maxTokens: 24, temperature: 0});
}
writeFileSync(out, JSON.stringify({results, answer}));
await llama.dispose();
process.exit(0);
