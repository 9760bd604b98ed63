// The dialog of settings: system prompt, temperature, longest answer, key.
import { at } from "./elements.js";
import { loadSettings, saveSettings } from "./store.js";

export const settings = loadSettings();
// The slider counts tenths; its left end is no temperature.
const OWN = -1;

/** Opens the dialog, with the field `focused` ready to type; `problem` says why the key is asked for. */
export function openSettings(focused, problem = "") {
  at("system").value = settings.system;
  at("temperature").value = settings.temperature === null ? OWN : 10 * settings.temperature;
  at("length").value = settings.length ?? "";
  at("key").value = settings.key;
  at("key-problem").textContent = problem;
  showTemperature();
  if (!at("dialog").open) at("dialog").showModal();
  focused?.focus();
}

export function chooseModel(model) {
  settings.model = model;
  saveSettings(settings);
}

/** Calls `act` when the dialog closes. */
export function onSettingsClosed(act) {
  at("dialog").onclose = act;
}

function keep() {
  showTemperature();
  settings.system = at("system").value.trim();
  const tenths = at("temperature").valueAsNumber;
  settings.temperature = tenths === OWN ? null : tenths / 10;
  settings.length = at("length").valueAsNumber >= 1 ? Math.floor(at("length").valueAsNumber) : null;
  settings.key = at("key").value.trim();
  saveSettings(settings);
}

function showTemperature() {
  const tenths = at("temperature").valueAsNumber;
  const shown = tenths === OWN ? "the server's" : (tenths / 10).toFixed(1);
  at("temperature-shown").value = shown;
  at("temperature").setAttribute("aria-valuetext", shown);
}

at("settings").onclick = () => openSettings();
at("close").onclick = () => at("dialog").close();
at("dialog").oninput = keep;
