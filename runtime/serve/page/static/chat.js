// The page: a conversation with one of the server's models.
import { complete, listModels } from "./api.js";
import { acceptFiles, hasAttachments, pickFiles, takeAttachments } from "./attachments.js";
import { at, element, icon } from "./elements.js";
import { partOf } from "./media.js";
import { announce, notify } from "./notices.js";
import { chooseModel, onSettingsClosed, openSettings, settings } from "./settings.js";
import { alone, loadTurns, onOtherTab, saveTurns } from "./store.js";
import { AnswerView, userTurn } from "./turns.js";

const STARTERS = [
  { icon: "image", title: "Show a picture", ask: "What is in the picture?", accept: "image/*" },
  { icon: "sound", title: "Play a sound", ask: "What do you hear?", accept: "audio/*" },
  { icon: "text", title: "Just ask", ask: "What is 3 plus 4?" },
];

// In order, {role: "user", text, media} and {role: "assistant", text, state, error, note}, where state is "running",
// "done", "stopped" or "failed".
let turns = [];
let models = [];
let answering = null; // the AbortController of the answer that is running
let isForgetful = false; // whether the browser could not save the conversation

// Models

async function showModels() {
  try {
    models = await listModels(settings.key);
  } catch (error) {
    if (error.status === 401) askForKey();
    else notify(error.message);
    return;
  }
  notify("");
  at("model").replaceChildren(...models.map(model => new Option(model.id, model.id)));
  if (models.some(model => model.id === settings.model)) at("model").value = settings.model;
  showHints();
}

const askForKey = () => openSettings(at("key"), settings.key ? "The server refuses this key." : "The server asks for its key.");
const chosenModel = () => models.find(model => model.id === at("model").value);

// What is shown

function showHints() {
  at("hints").hidden = turns.length > 0;
  at("starters").replaceChildren(...STARTERS.map(({ icon: name, title, ask, accept }) => {
    const start = () => {
      at("text").value = ask;
      fitText();
      at("text").focus();
      if (accept) pickFiles(accept);
    };
    return element("button", { type: "button", onclick: start }, icon(name), element("b", {}, title), element("span", {}, ask));
  }));
}

function showTurns() {
  at("talk").replaceChildren();
  turns.forEach(showTurn);
  showHints();
}

/** Appends a turn; returns the view of an answer. */
function showTurn(turn) {
  const view = turn.role === "assistant" ? new AnswerView(retry) : null;
  view?.update(turn);
  at("talk").append(view?.element ?? userTurn(turn));
  at("hints").hidden = true;
  scrollDown();
  return view;
}

const scrollDown = () => { at("scroll").scrollTop = at("scroll").scrollHeight; };
const isAtEnd = () => at("scroll").scrollHeight - at("scroll").scrollTop - at("scroll").clientHeight < 80;

function fitText() {
  at("text").style.height = "auto";
  at("text").style.height = `${at("text").scrollHeight}px`;
}

// Asking

async function ask() {
  const text = at("text").value.trim();
  if (!text) {
    if (hasAttachments()) notify("Write a question about the attachment, then send.");
    return;
  }
  await exclusively(async () => {
    notify("");
    turns.push({ role: "user", text, media: await takeAttachments() });
    showTurn(turns.at(-1));
    at("text").value = "";
    fitText();
    await answer();
  });
}

async function retry() {
  await exclusively(async () => {
    turns.pop();
    at("talk").lastElementChild.remove();
    at("text").focus();
    await answer();
  });
}

/** Runs `act`, which changes the conversation, unless an answer is running in this tab or, then told, in another. */
async function exclusively(act) {
  if (answering) return;
  answering = new AbortController();
  at("talk").setAttribute("aria-busy", "true");
  try {
    if (!(await alone(act))) notify("Another tab is answering; wait until it has finished.");
  } finally {
    answering = null;
    at("talk").setAttribute("aria-busy", "false");
    showSending();
  }
}

/** Answers the last turn, the user's. */
async function answer() {
  const conversation = turns;
  const asked = [...turns];
  const turn = { role: "assistant", text: "", state: "running" };
  turns.push(turn);
  const view = showTurn(turn);
  showSending();
  announce("Answering.");
  await keep();
  if (!models.length) await showModels();
  const shown = paced(() => {
    const follow = isAtEnd();
    view.update(turn);
    if (follow) scrollDown();
  });
  const started = performance.now();
  let usage = null, finish = null;
  try {
    for await (const chunk of complete(await requestOf(asked), settings.key, answering.signal)) {
      turn.text += chunk.choices[0]?.delta.content ?? "";
      finish = chunk.choices[0]?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
      if (chunk.warnings) notify(chunk.warnings.map(each => withNames(each, asked)).join(" "));
      shown();
    }
    turn.state = "done";
    turn.note = noteOf(turn.text, usage, finish, (performance.now() - started) / 1000);
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    turn.note = turn.state === "stopped" ? "Stopped" : "";
    if (turn.state === "failed") turn.error = messageOf(error, asked);
    if (error.status === 401) askForKey();
  }
  shown.now();
  announce(turn.state === "done" ? "The answer is complete." : turn.error ?? "Stopped.");
  if (conversation === turns) await keep();
}

/** Saves the conversation; says once if the browser cannot. */
async function keep() {
  if (await saveTurns(turns) || isForgetful) return;
  isForgetful = true;
  notify("This browser cannot keep the conversation; a reload will lose it.");
}

/** Whether the turn `i` is sent: questions without an answer, except the last, and empty answers are not. */
const isSent = (asked, i) => (asked[i].role === "assistant" ? asked[i].text : i === asked.length - 1 || asked[i + 1].text);

/** The request for an answer to `asked`. */
async function requestOf(asked) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, text, media = [] } of asked.filter((_, i) => isSent(asked, i))) {
    const parts = await Promise.all(media.map(partOf));
    messages.push({ role, content: parts.length ? [...parts, { type: "text", text }] : text });
  }
  const chosen = { temperature: settings.temperature ?? undefined, max_tokens: settings.length ?? undefined };
  return { model: at("model").value, messages, long_audio: "split", ...chosen }; // JSON leaves undefined out
}

/** A message of the server's, which numbers the media of a request, with the name of the file that it is about. */
function withNames(message, asked) {
  const [label, kind, number] = message.match(/^(image|audio|video) (\d+)(?=:)/) ?? [];
  const media = asked.filter((_, i) => isSent(asked, i)).flatMap(turn => turn.media ?? []);
  const file = media.filter(each => each.kind === kind)[number - 1];
  return file ? file.name + message.slice(label.length) : message;
}

function messageOf(error, asked) {
  if (error.code !== "context_length_exceeded") return withNames(error.message, asked);
  const room = chosenModel()?.max_model_len.toLocaleString("en") ?? "";
  return `The conversation is longer than the ${room} tokens that the model reads at once; start a new chat, or ask for less.`;
}

function noteOf(text, usage, finish, seconds) {
  if (!usage) return "";
  const { completion_tokens: made, total_tokens: taken } = usage;
  const room = chosenModel()?.max_model_len;
  const full = room ? ` · ${Math.round(100 * taken / room)} % of the context` : "";
  const cut = finish === "length" ? " · cut at the longest length" : "";
  const empty = text.trim() ? "" : "Empty answer · ";
  return `${empty}${made} token${made === 1 ? "" : "s"} in ${seconds.toFixed(1)} s${full}${cut}`;
}

/** Calls `act` at most once a frame; `now` calls it at once, and for the last time. */
function paced(act) {
  let frame = 0;
  const soon = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      act();
    });
  };
  soon.now = () => {
    cancelAnimationFrame(frame);
    act();
  };
  return soon;
}

function showSending() {
  const label = answering ? "Stop" : "Send";
  at("send").setAttribute("aria-label", label);
  at("send").title = label;
  at("send").replaceChildren(icon(answering ? "stop" : "send"));
}

async function startOver() {
  answering?.abort();
  if (answering) await clear();
  else await exclusively(clear);
}

async function clear() {
  const kept = turns;
  turns = [];
  showTurns();
  at("text").focus();
  const undo = async () => {
    turns = kept;
    showTurns();
    notify("");
    await keep();
  };
  if (kept.length) notify("A new chat has begun.", element("button", { type: "button", onclick: undo }, "Undo"));
  await keep();
}

// Wiring

at("form").onsubmit = event => {
  event.preventDefault();
  if (answering) answering.abort();
  else ask();
};
at("text").oninput = fitText;
at("text").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
at("new").onclick = startOver;
at("model").onchange = () => chooseModel(at("model").value);
acceptFiles(() => chosenModel()?.modalities);
onSettingsClosed(() => {
  if (!models.length && settings.key) showModels();
});
document.onkeydown = event => {
  if (event.key === "Escape" && !event.isComposing && !at("dialog").open) answering?.abort();
};

async function follow() {
  if (answering) return;
  turns = await loadTurns();
  showTurns();
}

// An answer that was running when the page was left has stopped.
turns = (await loadTurns()).map(turn => (turn.state === "running" ? { ...turn, state: "stopped", note: "Interrupted" } : turn));
showTurns();
onOtherTab(follow);
window.onpageshow = ({ persisted }) => persisted && follow(); // back from another page
await showModels();
document.body.dataset.ready = "yes";
