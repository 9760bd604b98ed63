// The server's API as far as the page uses it. Paths are relative, so that a proxy may serve the page under a prefix.

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The models that the server offers: [{id, modalities, max_model_len}]. Throws ApiError. */
export async function listModels(key) {
  return (await (await request("v1/models", { headers: headers(key) })).json()).data;
}

/** The chunks of a streamed chat completion, each as parsed JSON. Throws ApiError; AbortError if `signal` fires. */
export async function* complete(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new ApiError(chunk.error.message, response.status, chunk.error.code);
    yield chunk;
  }
}

function headers(key) {
  if (/[^ -~]/.test(key)) throw new ApiError("The key has a character that no request can carry.", 401); // ASCII only
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached; check that it is running, then retry.", 0);
  }
  if (response.ok) return response;
  const { error } = (await response.json().catch(() => ({}))) ?? {};
  throw new ApiError(error?.message ?? `The server answered with status ${response.status}.`, response.status, error?.code);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) lost();
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      if (block === "data: [DONE]") return;
      if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
    }
  }
}

function lost(error) {
  if (error?.name === "AbortError") throw error;
  throw new ApiError("The connection ended before the answer did; check that the server is running, then retry.", 0);
}
