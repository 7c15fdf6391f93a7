// Measures a GGUF file in llama.cpp through the npm package node-llama-cpp.
// node node_llama_cpp.mjs REQUEST.json ANSWER.json
// slim/evaluation/engines/engine.py says what is in both.
import {readFileSync, writeFileSync} from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [requestFile, answerFile] = process.argv.slice(2);
const request = JSON.parse(readFileSync(requestFile, "utf8"));
const packageFolder = path.join(request.engine_path, "node_modules", "node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(
    pathToFileURL(path.join(packageFolder, "dist", "index.js")).href
);

// Bytes from /proc/self/status; null where there is no such file.
function processBytes(field) {
    try {
        const line = readFileSync("/proc/self/status", "utf8").match(`${field}:\\s+(\\d+) kB`);
        return line === null ? null : 1024 * Number(line[1]);
    } catch {
        return null;
    }
}

function resetPeak() {
    try {
        writeFileSync("/proc/self/clear_refs", "5");
    } catch {
        // the peak then counts from the start of the process, which is a little more
    }
}

const llama = await getLlama({
    gpu: request.gpu ? "auto" : false,
    build: "never",
    logLevel: LlamaLogLevel.error,
    maxThreads: request.threads
});
resetPeak();
const before = processBytes("VmRSS");
const model = await llama.loadModel({modelPath: request.model});
const context = await model.createContext({
    contextSize: request.context,
    batchSize: Math.min(512, request.context),
    threads: request.threads
});
const sequence = context.getSequence();
const seconds = () => Number(process.hrtime.bigint()) / 1e9;

// Reads tokens and returns the most likely next one.
async function next(tokens) {
    const items = [...tokens];
    const last = items.length - 1;
    items[last] = [items[last], {generateNext: {token: true, options: {temperature: 0}}}];
    const outputs = await sequence.controlledEvaluate(items);
    return outputs[last].next.token;
}

async function timed({tokens, new_tokens: newTokens}) {
    await sequence.clearHistory();
    const start = seconds();
    let token = await next(tokens);
    const read = seconds();
    for (let count = 1; count < newTokens; count++)
        token = await next([token]);
    return {prefill: read - start, decode: seconds() - read};
}

const runs = [];
for (let run = 0; run < request.warmup && request.prompts.length > 0; run++)
    await timed(request.prompts[run % request.prompts.length]);
for (let round = 0; round < request.repeats; round++)
    for (const prompt of request.prompts)
        runs.push(await timed(prompt));
const resident = processBytes("VmRSS");
const peak = processBytes("VmHWM");

// The negative log-likelihood of every token after the first. The sum of exp(logit - largest) and
// the logit of the token come from the engine: all logits of a window would be a large answer.
async function windowNll(tokens) {
    await sequence.clearHistory();
    const items = tokens.slice(0, -1).map((token, index) => [token, {
        generateNext: {
            logits: {filter: {tokens: [tokens[index + 1]], includeSelected: true}},
            totalLogitWeight: true,
            options: {temperature: 0}
        }
    }]);
    const outputs = await sequence.controlledEvaluate(items);
    let sum = 0;
    for (let index = 0; index < items.length; index++) {
        const {logits, totalLogitWeight} = outputs[index].next;
        // at temperature 0 the selected token is the one with the largest logit
        const largest = Math.max(...logits.values());
        sum += largest + Math.log(totalLogitWeight) - logits.get(tokens[index + 1]);
    }
    return sum;
}

const nll = [];
for (const window of request.windows)
    nll.push(await windowNll(window));

const continuations = [];
for (const {tokens, new_tokens: newTokens, ends} of request.continuations) {
    await sequence.clearHistory();
    const chosen = [];
    let token = await next(tokens);
    while (chosen.length < newTokens && !ends.includes(token)) {
        chosen.push(token);
        if (chosen.length < newTokens)
            token = await next([token]);
    }
    continuations.push(chosen);
}

writeFileSync(answerFile, JSON.stringify({
    runs,
    nll,
    continuations,
    resident_bytes: before === null ? null : resident - before,
    peak_bytes: before === null ? null : peak - before
}));
// its threads would keep the process alive
process.exit(0);
