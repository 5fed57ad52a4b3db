// What the studio's page asks its server. Errors are told in the server's own words.

async function asked(path, options = {}) {
  const answer = await fetch(path, { credentials: "same-origin", ...options });
  if (answer.ok) return answer;
  let why = await answer.text();
  try { why = JSON.parse(why).why ?? why; } catch { /* plain words */ }
  throw new Error(why);
}

export const get = async (path) => (await asked(path)).json();

export const post = async (path, body) => (await asked(path, { method: "POST",
  headers: { "content-type": "application/json" }, body: JSON.stringify(body) })).json();

export const upload = async (file) => (await asked("/api/uploads", { method: "POST", body: file })).json();

export const keep = async (file) => (await asked("/api/files", { method: "POST", body: file })).json();

export const bytes = async (path) => new Uint8Array(await (await asked(path)).arrayBuffer());

// Raw deflate, as the report's blocks are.
export async function inflated(path) {
  const stream = new Blob([await bytes(path)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Starts a job and hears it: heard(name, what) for every event. Handle: {done: promise, stop()}. An end that is no
// success rejects; of a job that was stopped the error has `stopped`.
export function job(path, body, heard) {
  let id = null, stopped = false;
  const stop = () => {
    stopped = true;
    if (id) asked(`/api/jobs/${id}`, { method: "DELETE" }).catch(() => {});
  };
  const done = post(path, body).then((answer) => new Promise((resolve, reject) => {
    id = answer.id;
    if (stopped) stop();
    const source = new EventSource(`/api/jobs/${id}/events`);
    const end = (settle, value) => { source.close(); settle(value); };
    for (const name of ["queued", "progress", "model", "said", "answer", "page", "saved", "scores", "curves", "methods", "paper",
      "example", "contrast", "heads", "patching", "faithfulness", "paths", "gaze", "reading", "maps", "edited"]) {
      source.addEventListener(name, (event) => heard(name, JSON.parse(event.data)));
    }
    source.addEventListener("done", (event) => end(resolve, JSON.parse(event.data)));
    source.addEventListener("failed", (event) => end(reject, new Error(JSON.parse(event.data).why)));
    source.addEventListener("cancelled", () => end(reject, Object.assign(new Error("Stopped."), { stopped: true })));
    source.onerror = () => end(reject, new Error("The studio does not answer; is it still running?"));
  }));
  return { done, stop };
}
