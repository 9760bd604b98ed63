// What survives a reload: the conversation with its media in IndexedDB, settings in localStorage, the key in the tab's
// own sessionStorage. The page works without storage, too.

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

/** Whether the turns are kept. */
export async function saveTurns(turns) {
  try {
    await inTable("readwrite", table => table.put(turns, CURRENT));
    CHANGES.postMessage(null);
    return true;
  } catch {
    return false;
  }
}

/** Runs `act` unless another tab is in an `act` of its own; whether it ran. Browsers have no locks on plain http. */
export async function alone(act) {
  if (!navigator.locks) return act().then(() => true);
  return navigator.locks.request("gemma3n", { ifAvailable: true }, async lock => {
    if (lock) await act();
    return Boolean(lock);
  });
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

/** What `act` asked of the table, once that is on the disk. */
async function inTable(mode, act) {
  const opening = indexedDB.open("gemma3n", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE);
  const database = await new Promise((resolve, reject) => {
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  try {
    const transaction = database.transaction(TABLE, mode);
    const asked = act(transaction.objectStore(TABLE));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    return asked.result;
  } finally {
    database.close();
  }
}
