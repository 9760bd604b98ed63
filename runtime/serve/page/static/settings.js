// The dialog of settings: system prompt, temperature, longest answer, key.
import { at } from "./elements.js";
import { loadSettings, saveSettings } from "./store.js";

export const settings = loadSettings();

/** Opens the dialog, with the field `focused` ready to type. */
export function openSettings(focused) {
  at("system").value = settings.system;
  at("temperature").value = settings.temperature;
  at("length").value = settings.length ?? "";
  at("key").value = settings.key;
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
  settings.temperature = at("temperature").valueAsNumber;
  settings.length = at("length").valueAsNumber >= 1 ? Math.floor(at("length").valueAsNumber) : null;
  settings.key = at("key").value.trim();
  saveSettings(settings);
}

const showTemperature = () => { at("temperature-shown").value = at("temperature").valueAsNumber.toFixed(1); };

at("settings").onclick = () => openSettings();
at("close").onclick = () => at("dialog").close();
at("dialog").oninput = keep;
