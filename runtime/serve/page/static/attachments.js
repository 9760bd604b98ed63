// What the next message takes along: picked, pasted, dropped or recorded.
import { at, element, iconButton } from "./elements.js";
import { attachmentOf, startRecording } from "./media.js";
import { announce, notify } from "./notices.js";
import { preview } from "./turns.js";

const EVERYTHING = "image/*,audio/*,video/*,.heic,.heif";
let attached = [];
let attaching = Promise.resolve(); // ends when all files that were given are read
let modalities = () => undefined;
let recording = null; // {stop, timer} while the microphone is on

/** `modalities()` are those of the chosen model, undefined while it is unknown. */
export function acceptFiles(ofModel) {
  modalities = ofModel;
}

export const hasAttachments = () => attached.length > 0;

/** The attachments, which then are the message's. Waits for files that are being read. */
export async function takeAttachments() {
  await attaching;
  const taken = attached;
  attached = [];
  showAttached();
  return taken;
}

/** Opens the browser's dialog for files. */
export function pickFiles(accept) {
  at("files").accept = accept;
  at("files").click();
}

function attach(files) {
  attaching = attaching.then(() => read(files));
  return attaching;
}

async function read(files) {
  const refused = [];
  for (const file of files) {
    try {
      const item = await attachmentOf(file, modalities());
      attached.push(item);
      announce(`Attached ${item.name}.`);
    } catch (error) {
      refused.push(error.message);
    }
  }
  notify(refused.join(" "));
  showAttached();
  at("text").focus();
}

function showAttached() {
  at("attached").hidden = !attached.length;
  at("attached").replaceChildren(...attached.map(item => {
    const remove = iconButton("close", `Remove ${item.name}`, () => {
      attached = attached.filter(other => other !== item);
      showAttached();
      at("text").focus();
    });
    return element("li", {}, preview(item), remove);
  }));
}

async function toggleRecording() {
  if (recording) {
    const { stop, timer } = recording;
    recording = null;
    clearInterval(timer);
    showRecording(0);
    await attach([await stop()]);
    return;
  }
  try {
    const stop = await startRecording();
    const started = Date.now();
    const timer = setInterval(() => showRecording((Date.now() - started) / 1000), 500);
    recording = { stop, timer };
    showRecording(0);
  } catch (error) {
    notify(`The microphone cannot be used: ${error.message}`);
  }
}

function showRecording(seconds) {
  const label = recording ? "Stop recording" : "Record sound";
  at("record").setAttribute("aria-label", label);
  at("record").setAttribute("aria-pressed", String(Boolean(recording)));
  at("record").title = label;
  at("recorded").textContent = recording ? `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}` : "";
}

at("attach").onclick = () => pickFiles(EVERYTHING);
at("files").onchange = async () => {
  await attach([...at("files").files]);
  at("files").value = "";
};
at("record").onclick = toggleRecording;
at("text").onpaste = event => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attach(files);
};

let inside = 0; // drags enter and leave every element that they cross
const isFiles = event => event.dataTransfer?.types.includes("Files");
document.ondragenter = event => {
  if (!isFiles(event)) return;
  inside += 1;
  document.body.classList.add("dropping");
};
document.ondragleave = event => {
  if (isFiles(event) && --inside <= 0) endDrag();
};
document.ondragover = event => {
  if (isFiles(event)) event.preventDefault();
};
document.ondrop = event => {
  if (!isFiles(event)) return;
  event.preventDefault();
  endDrag();
  attach([...event.dataTransfer.files]);
};
function endDrag() {
  inside = 0;
  document.body.classList.remove("dropping");
}
