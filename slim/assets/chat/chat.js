"use strict";
// One page for one to three models. Texts of models are only ever put in as text, never as HTML.

const SETTINGS = ["temperature", "top_p", "max_tokens", "repetition_penalty", "seed"];
const get = (id) => document.getElementById(id);
let models = [];     // of /v1/models
let turns = [];      // {question, answers: {model -> text}, preferred}
let running = null;  // an AbortController while models answer

function make(kind, className, text) {
  const element = document.createElement(kind);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(2)} GB`;
  return `${(bytes / 1e6).toFixed(bytes >= 1e8 ? 0 : 1)} MB`;
}

function say(text) { get("status").textContent = text; }

async function reason(response) {
  try {
    return (await response.json()).error;
  } catch {
    return { message: `HTTP ${response.status}` };
  }
}

// What a model has been told so far, with its own answers.
function messagesFor(model, until) {
  const messages = [];
  const system = get("system").value.trim();
  if (system && model.slim.system_prompt) messages.push({ role: "system", content: system });
  for (const turn of turns.slice(0, until)) {
    if (!turn.answers[model.id]) continue;  // a template wants questions and answers in turn
    messages.push({ role: "user", content: turn.question });
    messages.push({ role: "assistant", content: turn.answers[model.id] });
  }
  messages.push({ role: "user", content: turns[until].question });
  return messages;
}

function requestFor(model, number) {
  const body = { model: model.id, stream: true };
  for (const name of SETTINGS) {
    if (get(name).value !== "") body[name] = Number(get(name).value);
  }
  if (!model.slim.chat_template) return { path: "v1/completions", body: { ...body, prompt: turns[number].question } };
  body.messages = messagesFor(model, number);
  body.truncate_history = true;
  return { path: "v1/chat/completions", body };
}

// Yield the lines of a stream of events as they come.
async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

function figures(took, finish) {
  const parts = [`wrote ${took.completion_tokens} tokens`];
  if (took.writing_tokens_per_second) parts[0] += ` at ${Math.round(took.writing_tokens_per_second)} tok/s`;
  parts.push(`read ${took.prompt_tokens} in ${took.reading_seconds.toFixed(2)} s`);
  parts.push(`${size(took.weights_bytes + took.cache_bytes)} of memory`);
  if (took.left_out) parts.push(`the oldest ${took.left_out} messages had no room`);
  if (finish === "length") parts.push("cut: no more tokens");
  return parts.join(" · ");
}

async function answer(model, number, card, signal) {
  const text = card.querySelector(".text");
  const line = card.querySelector(".figures");
  const { path, body } = requestFor(model, number);
  try {
    const response = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw new Error((await reason(response)).message);
    for await (const received of linesOf(response)) {
      if (received.startsWith(": ")) line.textContent = received.slice(2);
      if (!received.startsWith("data: ") || received === "data: [DONE]") continue;
      const part = JSON.parse(received.slice(6));
      if (part.error) throw new Error(part.error.message);
      const choice = part.choices[0];
      text.textContent += choice.text ?? choice.delta?.content ?? "";
      line.textContent = part.slim ? figures(part.slim, choice.finish_reason) : "writing";
    }
  } catch (error) {
    if (error.name === "AbortError") {
      line.textContent = "stopped";
    } else {
      card.classList.add("problem");
      line.textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
    }
  }
  const written = text.textContent;
  if (!written) return;
  turns[number].answers[model.id] = written;
  card.querySelector(".prefer").disabled = false;
}

async function prefer(number, model, cards) {
  const first = models.find((one) => one.id === model.id);
  const response = await fetch("preferences", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages: messagesFor(first, number), answers: turns[number].answers, preferred: model.id }),
  }).catch(() => null);
  if (!response || !response.ok) {
    say(response ? (await reason(response)).message : "The server cannot be reached.");
    return;
  }
  turns[number].preferred = model.id;
  for (const [name, card] of Object.entries(cards)) {
    card.classList.toggle("preferred", name === model.id);
    card.querySelector(".prefer").textContent = name === model.id ? "Preferred" : "Prefer this one";
  }
  say(`Kept in ${(await response.json()).file}.`);
}

async function ask(question) {
  const number = turns.push({ question, answers: {}, preferred: null }) - 1;
  const turn = make("section", "turn");
  turn.append(make("div", "question", question));
  const row = make("div", "columns");
  const cards = {};
  for (const model of models) {
    const card = make("article", "answer");
    card.dataset.model = model.id;
    card.append(make("div", "name", model.id), make("div", "text"), make("div", "figures", "waiting"));
    const button = make("button", "prefer", "Prefer this one");
    button.type = "button";
    button.disabled = true;
    button.addEventListener("click", () => prefer(number, model, cards));
    card.append(button);
    cards[model.id] = card;
    row.append(card);
  }
  turn.append(row);
  get("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  running = new AbortController();
  update();
  await Promise.all(models.map((model) => answer(model, number, cards[model.id], running.signal)));
  running = null;
  update();
  turn.scrollIntoView({ block: "end" });  // answers have made it longer
  get("question").focus({ preventScroll: true });
}

function update() {
  get("send").disabled = running !== null || !models.length;
  get("stop").disabled = running === null;
  get("again").disabled = running !== null || !turns.length;
}

function send() {
  const question = get("question").value.trim();
  if (!question || running || !models.length) return;
  get("question").value = "";
  say("");
  ask(question);
}

function again() {
  const turn = turns.pop();
  get("turns").lastElementChild.remove();
  ask(turn.question);
}

function startAnew() {
  if (running) running.abort();
  turns = [];
  get("turns").replaceChildren();
  say("");
  update();
  get("question").focus();
}

function showModels() {
  document.documentElement.style.setProperty("--count", models.length);
  for (const model of models) {
    const box = make("div", "model");
    const facts = [size(model.slim.weights_bytes), model.slim.dtype, `context ${model.slim.context.toLocaleString("en")}`];
    if (!model.slim.chat_template) facts.push("no chat template: continues each text by itself");
    else if (!model.slim.system_prompt) facts.push("takes no system prompt");
    box.append(make("strong", "", model.id), make("div", "figures", facts.join(" · ")));
    if (model.slim.chain) box.append(make("div", "figures", model.slim.chain));
    get("models").append(box);
  }
  get("system").disabled = models.every((model) => !model.slim.system_prompt);
}

async function begin() {
  get("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  get("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  get("stop").addEventListener("click", () => running && running.abort());
  get("again").addEventListener("click", again);
  get("new").addEventListener("click", startAnew);
  const settings = await (await fetch("settings")).json();
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null) get(name).value = value;
  }
  models = (await (await fetch("v1/models")).json()).data;
  showModels();
  update();
}

begin().catch((error) => say(`The page cannot begin: ${error.message}`));
