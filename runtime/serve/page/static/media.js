// Files and recordings as attachments: {kind: "image" | "audio" | "video", name, blob}.

const SAMPLE_RATE = 16000;
// Browsers do not know the type of every file that the server reads.
const BY_NAME = [
  [/\.(avif|bmp|gif|heic|heif|jp2|jpe?g|png|tiff?|webp)$/i, "image"],
  [/\.(aac|aiff?|flac|m4a|mp3|oga|ogg|opus|wav)$/i, "audio"],
  [/\.(avi|m4v|mkv|mov|mp4|mpe?g|ogv|webm)$/i, "video"],
];
const WORDS = { image: "pictures", audio: "sounds", video: "videos" };
const MODALITIES = { image: "vision", audio: "audio", video: "vision" };

/**
 * The attachment of a file for a model that takes `modalities`, if they are known. Throws an Error whose message says
 * what is wrong.
 */
export async function attachmentOf(file, modalities) {
  const name = file.name || "recording.wav";
  const kind = kindOf(file);
  if (!kind) throw new Error(`${name} is neither a picture nor a sound nor a video; attach one of these.`);
  if (modalities && !modalities.includes(MODALITIES[kind])) throw new Error(`This model does not take ${WORDS[kind]}; choose another.`);
  const bytes = await file.arrayBuffer().catch(() => { // a copy, as the file may change before it is sent
    throw new Error(`${name} cannot be read; attach another file.`);
  });
  if (!bytes.byteLength) throw new Error(`${name} is empty; attach another file.`);
  return { kind, name, blob: kind === "audio" ? await toWav(bytes, name) : new Blob([bytes], { type: file.type }) };
}

/** The part of a message that an attachment becomes. */
export async function partOf({ kind, blob }) {
  const url = await dataUrl(blob);
  if (kind === "audio") return { type: "input_audio", input_audio: { data: url.split(",")[1], format: "wav" } };
  return kind === "image" ? { type: "image_url", image_url: { url } } : { type: "video_url", video_url: { url } };
}

/** Starts to record from the microphone. Returns a function that stops and resolves to the recording. */
export async function startRecording() {
  if (!navigator.mediaDevices) throw new Error("Browsers allow the microphone only on https and on localhost.");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream);
  const pieces = [];
  recorder.ondataavailable = event => pieces.push(event.data);
  recorder.start();
  return () => new Promise(resolve => {
    recorder.onstop = () => {
      stream.getTracks().forEach(track => track.stop());
      resolve(new Blob(pieces, { type: recorder.mimeType.replace("video/", "audio/") }));
    };
    recorder.stop();
  });
}

function kindOf(file) {
  const kind = file.type.split("/")[0];
  return kind in MODALITIES ? kind : BY_NAME.find(([pattern]) => pattern.test(file.name ?? ""))?.[1];
}

const dataUrl = blob => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

/** Any sound that the browser can play as 16 kHz mono WAV, for which the server needs no decoder. */
async function toWav(bytes, name) {
  let decoded;
  try {
    decoded = await new OfflineAudioContext(1, 1, SAMPLE_RATE).decodeAudioData(bytes);
  } catch {
    throw new Error(`${name} is not a sound that this browser can read; convert it to WAV or MP3.`);
  }
  const context = new OfflineAudioContext(1, Math.max(1, Math.ceil(decoded.duration * SAMPLE_RATE)), SAMPLE_RATE);
  const source = new AudioBufferSourceNode(context, { buffer: decoded });
  source.connect(context.destination);
  source.start();
  return wavFile((await context.startRendering()).getChannelData(0));
}

function wavFile(samples) {
  const bytes = 2 * samples.length;
  const view = new DataView(new ArrayBuffer(44 + bytes));
  const put = (offset, text) => [...text].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  put(0, "RIFF");
  view.setUint32(4, 36 + bytes, true);
  put(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of the format chunk
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, SAMPLE_RATE, true);
  view.setUint32(28, 2 * SAMPLE_RATE, true); // bytes per second
  view.setUint16(32, 2, true); // bytes per frame
  view.setUint16(34, 16, true); // bits per sample
  put(36, "data");
  view.setUint32(40, bytes, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, x)) * 32767), true));
  return new Blob([view], { type: "audio/wav" });
}
