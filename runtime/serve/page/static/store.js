// What survives a reload: the conversation with its media in IndexedDB, settings in localStorage, the key in the tab's
// own sessionStorage. A browser that forbids storage keeps nothing, and the page works.

const TABLE = "conversations";
const CURRENT = "current";
const SETTINGS = "gemma3n-settings";
const KEY = "gemma3n-key";
const CHANGES = new BroadcastChannel("gemma3n");
const DEFAULTS = { model: "", system: "", temperature: null, length: null }; // null is the server's

export async function loadTurns() {
  try {
    return (await inTable("readonly", table => table.get(CURRENT))) ?? [];
  } catch {
    return [];
  }
}

export async function saveTurns(turns) {
  try {
    await inTable("readwrite", table => table.put(turns, CURRENT));
    CHANGES.postMessage(null);
  } catch {
    // Nothing is kept.
  }
}

/** Calls `act` when another tab has saved its conversation. */
export function onOtherTab(act) {
  CHANGES.onmessage = act;
}

export function loadSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS)), key: sessionStorage.getItem(KEY) ?? "" };
  } catch {
    return { ...DEFAULTS, key: "" };
  }
}

export function saveSettings({ key, ...settings }) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
    sessionStorage.setItem(KEY, key);
  } catch {
    // Nothing is kept.
  }
}

async function inTable(mode, act) {
  const database = await settled(opening());
  try {
    return await settled(act(database.transaction(TABLE, mode).objectStore(TABLE)));
  } finally {
    database.close();
  }
}

function opening() {
  const request = indexedDB.open("gemma3n", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE);
  return request;
}

const settled = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
