// The page: a picture is read into a session of the server, questions are asked about it, and what was kept is shaded.

const KEY = "edge-shiftkv-key";
const element = (id) => document.getElementById(id);
const show = (id, visible = true) => {
  element(id).hidden = !visible;
};

let key = sessionStorage.getItem(KEY) ?? "";
let picture = null; // {url: of its bytes}
let session = null; // a promise of what the server says of the picture that it has read
let nTokens = 0; // that the picture has as a prompt; 0 before that is known
let asking = null; // the AbortController of what is waited for
let entries = []; // what was asked about the picture: {question, budget, method, text, kept, figures, session, note}
let shown = null; // the one of them that is to be seen
let pointed = null; // the patch of the map that is told about: [row, column]

class Refused extends Error {
  constructor({ message, code }) {
    super(message);
    this.code = code;
  }
}

// ---- The server ----

async function call(method, path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ message: "The server does not answer: is it still running?" });
  }
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    throw new Refused(said?.error ?? { message: `the server answered with status ${response.status}` });
  }
  return response;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let left = "";
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    left += decoder.decode(value, { stream: !done });
    const lines = left.split("\n\n");
    left = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Refused(event.error);
      yield event;
    }
    if (done) throw new Refused({ message: "The answer broke off: the server went away." });
  }
}

/** The session of the picture: it is opened if it is not yet. */
async function read(signal) {
  const mine = (session ??= call("POST", "/v1/sessions", { images: [picture.url], ...settings() }, signal).then(
    (response) => response.json(),
  ));
  try {
    const opened = await mine;
    nTokens = opened.prompt_tokens;
    tellBudget();
    return opened;
  } catch (error) {
    if (session === mine) {
      session = null;
      if (error.code === "invalid_image") picture = null;
    }
    throw error;
  }
}

function settings() {
  const percent = element("budget").valueAsNumber;
  return { kv_budget: percent < 100 ? percent / 100 : null, kv_method: element("method").value };
}

// ---- A picture ----

async function take(file) {
  asking?.abort();
  fail(null);
  session?.then((old) => call("DELETE", `/v1/sessions/${old.id}`)).catch(() => {});
  session = null;
  nTokens = 0;
  tellBudget();
  entries = [];
  list();
  select(null);
  const image = element("picture");
  URL.revokeObjectURL(image.src);
  element("send").disabled = true;
  show("empty", false);
  const mine = (picture = { url: "" });
  mine.url = await dataUrl(file);
  if (picture !== mine) return; // another one was chosen meanwhile
  image.src = URL.createObjectURL(file);
  const { naturalWidth, naturalHeight } = await image.decode().then(() => image, () => ({}));
  if (picture !== mine) return;
  // What this browser cannot show, the server may know all the same, and then tells its size.
  if (naturalWidth) layOut(naturalWidth, naturalHeight);
  else image.removeAttribute("src");
  await waitFor("Reading the picture", async (signal) => {
    const { images } = await read(signal);
    if (picture !== mine) return;
    layOut(images[0].width, images[0].height);
    status("The picture is read: ask about it.");
    element("question").focus();
  });
  if (picture === mine || !picture) element("send").disabled = !picture;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function layOut(width, height) {
  element("stage").style.setProperty("--ratio", width / height);
  show("figure");
  draw();
}

// ---- A question ----

async function ask() {
  const question = element("question").value.trim();
  if (asking || !picture || !question) return;
  const entry = { question, ...settings(), text: "", kept: undefined, figures: null };
  fail(null);
  await waitFor("Waiting for the answer", async (signal) => {
    entries.push(entry);
    select(entry);
    element("answer").setAttribute("aria-busy", "true");
    try {
      await answer(entry, signal);
      status("");
    } finally {
      element("answer").setAttribute("aria-busy", "false");
    }
  });
  if (!entry.text && !entry.figures) {
    entries = entries.filter((other) => other !== entry);
    select(entries.at(-1) ?? null);
  }
  list();
}

async function answer(entry, signal, again = true) {
  entry.session = await read(signal);
  const { question, kv_budget, kv_method } = entry;
  const body = { question, kv_budget, kv_method, stream: true };
  try {
    const path = `/v1/sessions/${entry.session.id}/ask`;
    for await (const chunk of events(await call("POST", path, body, signal))) {
      if ("kept" in chunk) entry.kept = chunk.kept;
      if (chunk.figures) entry.figures = chunk.figures;
      entry.text += chunk.choices[0]?.delta.content ?? "";
      if (chunk.choices[0]?.finish_reason === "length") entry.note = "The answer has its greatest length.";
      refresh(entry);
    }
  } catch (error) {
    if (error.code !== "session_not_found" || !again) throw error;
    status("Reading the picture once more");
    session = null;
    await answer(entry, signal, false);
  }
}

async function waitFor(what, work) {
  const controller = (asking = new AbortController());
  const started = performance.now();
  const clock = setInterval(() => {
    element("clock").textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  }, 100);
  status(what);
  show("send", false);
  show("stop");
  try {
    await work(controller.signal);
  } catch (error) {
    if (controller === asking) status(error.name === "AbortError" ? "Stopped." : "");
    if (error.name !== "AbortError") fail(error);
  } finally {
    clearInterval(clock);
    if (controller === asking) {
      asking = null;
      element("clock").textContent = "";
      show("send");
      show("stop", false);
    }
  }
}

// ---- What is seen ----

function status(text) {
  element("status").textContent = text;
}

function fail(error) {
  show("error", Boolean(error));
  element("error").textContent = error?.message ?? "";
  if (error?.code === "invalid_api_key") askForKey(error.message);
}

function tellBudget() {
  const { kv_budget: share } = settings();
  const all = "all of the prompt: nothing is cut";
  const n = Math.max(2, Math.round(share * nTokens));
  const about = nTokens ? `, about ${n} of ${nTokens} KV pairs in each layer and head` : "";
  const text = share === null ? all : `${Math.round(share * 100)} % of the prompt${about}`;
  element("budget-text").textContent = text;
  element("budget").setAttribute("aria-valuetext", text);
}

function select(entry) {
  shown = entry;
  pointed = null;
  show("shown", Boolean(entry));
  if (entry) refresh(entry);
  for (const other of entries) other.button?.setAttribute("aria-current", String(other === entry));
  draw();
}

function refresh(entry) {
  if (entry !== shown) return;
  const { question, text, note, kept, figures, session: read } = entry;
  element("asked").textContent = question;
  element("answer").textContent = note ? `${text}\n(${note})` : text;
  show("caches", Boolean(figures));
  show("times", Boolean(figures));
  if (figures) {
    const { prompt_tokens: n, kept_tokens: m } = figures;
    const percent = (100 * m) / n;
    element("pairs-whole").textContent = n;
    element("pairs-kept").textContent = m < n ? `${m} (${percent.toFixed(0)} %)` : `${m} (all)`;
    element("bytes-whole").textContent = bytes(figures.kv_bytes_prompt);
    element("bytes-kept").textContent = bytes(figures.kv_bytes_kept);
    element("bar-whole").style.width = "100%";
    element("bar-kept").style.width = `${percent}%`;
    element("read-s").textContent = seconds(read.read_s);
    element("first-s").textContent = seconds(figures.prefill_s + figures.selection_s);
    const held = read.kv_bytes === null ? "" : `: ${bytes(read.kv_bytes)}, with room for them`;
    element("held").textContent = `The server holds the whole prompt for further questions${held}.`;
    element("rate").textContent = figures.tokens_per_second?.toFixed(1) ?? "none: one token";
  }
  if (kept !== entry.drawn) {
    entry.drawn = kept;
    draw();
  }
}

function list() {
  show("earlier", entries.length > 0);
  const items = entries.map((entry) => {
    const item = document.createElement("li");
    const button = (entry.button = document.createElement("button"));
    const small = document.createElement("small");
    const { kv_budget: share, kv_method: method, figures } = entry;
    const cut = share === null ? "all kept" : `${Math.round(share * 100)} % kept by ${method}`;
    const took = figures ? `, first token after ${seconds(figures.prefill_s + figures.selection_s)}` : "";
    button.type = "button";
    button.textContent = `${entry.question} → ${entry.text}`;
    small.textContent = cut + took;
    button.append(small);
    button.setAttribute("aria-current", String(entry === shown));
    button.addEventListener("click", () => select(entry));
    item.append(button);
    return item;
  });
  element("entries").replaceChildren(...items.reverse());
}

function bytes(n) {
  return n === null ? "unknown" : `${(n / 2 ** 20).toFixed(2)} MiB`;
}

function seconds(s) {
  return `${s.toFixed(s < 1 ? 3 : 1)} s`;
}

// ---- The map ----

const RAMP = [[255, 232, 190], [253, 190, 110], [244, 124, 70], [214, 62, 52]];

/** The colour of a patch that `count` heads kept, where none was kept by more than `top`. */
function colour(count, top) {
  if (count === 0) return "rgba(110, 110, 110, 0.6)";
  const at = (count / top) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  const mixed = RAMP[low].map((value, i) => Math.round(value + (RAMP[low + 1][i] - value) * (at - low)));
  return `rgba(${mixed.join(", ")}, 0.55)`;
}

function currentMap() {
  return shown?.kept?.maps[element("part").selectedIndex] ?? shown?.kept?.maps[0];
}

/** Where the patches are, in pixels of a canvas: beyond it where the picture was padded on both sides. */
function grid(map, { width, height }) {
  const rows = map.counts.length;
  const columns = map.counts[0].length;
  const side = Math.max(width / columns, height / rows);
  const [dx, dy] = map.padded ? [side, side] : [width / columns, height / rows];
  return { dx, dy, rows, columns, left: (width - dx * columns) / 2, upper: (height - dy * rows) / 2 };
}

function draw() {
  const canvas = element("map");
  const context = canvas.getContext("2d");
  const box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * devicePixelRatio);
  canvas.height = Math.round(box.height * devicePixelRatio);
  fillParts();
  const map = currentMap();
  show("legend", Boolean(map));
  canvas.tabIndex = map ? 0 : -1;
  canvas.setAttribute("aria-label", map ? "Patches by how many kept them; arrow keys go through them" : "No patches");
  if (!map) {
    const nothing = shown?.kept === null ? "Nothing was cut: the answer was read from the whole picture." : "";
    element("readout").textContent = nothing;
    return;
  }
  const { dx, dy, left, upper } = grid(map, canvas);
  const top = Math.max(1, ...map.counts.flat());
  const edge = (start, size, i) => Math.round(start + size * i);
  map.counts.forEach((row, y) => {
    row.forEach((count, x) => {
      const [x0, y0] = [edge(left, dx, x), edge(upper, dy, y)];
      context.fillStyle = colour(count, top);
      context.fillRect(x0, y0, edge(left, dx, x + 1) - x0, edge(upper, dy, y + 1) - y0);
    });
  });
  element("top").textContent = top;
  element("heads").textContent = shown.kept.heads;
  if (pointed) {
    const [y, x] = pointed;
    context.lineWidth = 2 * devicePixelRatio;
    context.strokeStyle = "#000";
    context.strokeRect(left + dx * x, upper + dy * y, dx, dy);
  }
  tellPatch(map);
}

function tellPatch(map) {
  const [y, x] = pointed ?? [];
  element("readout").textContent = pointed
    ? `Patch in row ${y + 1}, column ${x + 1}: kept by ${map.counts[y][x]} of ${shown.kept.heads}.`
    : "Point at a patch to see how many kept it.";
}

function fillParts() {
  const parts = (shown?.kept?.maps ?? []).map((map) => map.part);
  show("parts-row", parts.length > 1);
  const list = element("part");
  if (parts.join() === [...list.options].map((option) => option.value).join()) return;
  list.replaceChildren(...parts.map((part) => new Option(part, part)));
}

function point(patch) {
  if (String(patch) === String(pointed)) return;
  pointed = patch;
  draw();
}

function patchAt({ offsetX, offsetY }) {
  const map = currentMap();
  if (!map) return null;
  const { clientWidth: width, clientHeight: height } = element("map");
  const { dx, dy, left, upper, rows, columns } = grid(map, { width, height });
  const [y, x] = [Math.floor((offsetY - upper) / dy), Math.floor((offsetX - left) / dx)];
  return y >= 0 && y < rows && x >= 0 && x < columns ? [y, x] : null;
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function move(event) {
  const map = currentMap();
  const step = MOVES[event.key];
  if (!map || !step) return;
  event.preventDefault();
  const [y, x] = pointed ? pointed.map((at, i) => at + step[i]) : [0, 0];
  if (map.counts[y]?.[x] !== undefined) point([y, x]);
}

// ---- The beginning ----

function askForKey(message) {
  show("key-form");
  show("main", false);
  show("key-error", Boolean(message));
  element("key-error").textContent = message ?? "";
  element("key").focus();
}

async function begin() {
  let model;
  try {
    model = (await (await call("GET", "/v1/models")).json()).data[0];
  } catch (error) {
    if (error.code === "invalid_api_key") askForKey(error.message);
    else fail(error);
    show("main", error.code !== "invalid_api_key");
    return;
  }
  show("key-form", false);
  show("main");
  element("model").textContent = model.id;
  element("method").replaceChildren(...model.kv_methods.map((name) => new Option(name, name)));
  element("method").value = model.kv_method ?? model.kv_methods[0];
  const budget = model.kv_budget;
  if (budget > 0 && budget < 1) element("budget").valueAsNumber = Math.round(budget * 100);
  tellBudget();
  if (!model.images) fail(new Error("This model reads no pictures: start the server with --mmproj."));
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = element("key").value;
  sessionStorage.setItem(KEY, key);
  element("key").value = "";
  begin();
});
element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
element("stop").addEventListener("click", () => asking?.abort());
element("budget").addEventListener("input", () => tellBudget());
element("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) take(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
element("example").addEventListener("click", async () => {
  element("question").value ||= "Read line 2.";
  take(await (await call("GET", "/example.png")).blob());
});
element("part").addEventListener("change", () => {
  pointed = null;
  draw();
});
element("map").addEventListener("pointermove", (event) => point(patchAt(event)));
element("map").addEventListener("pointerleave", () => point(null));
element("map").addEventListener("keydown", move);
new ResizeObserver(draw).observe(element("stage"));

addEventListener("dragover", (event) => {
  event.preventDefault(); // else the browser would open the file
  element("drop").classList.add("over");
});
addEventListener("dragleave", () => element("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) take(file);
  else fail(new Error("That was no file: drop a picture's file."));
});
addEventListener("paste", ({ clipboardData }) => {
  const [file] = clipboardData.files;
  if (file) take(file);
});

const about = await (await call("GET", "/page.json")).json();
show("example", about.example);
if (about.api_key && !key) askForKey();
else begin();
