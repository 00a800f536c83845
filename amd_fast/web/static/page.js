// The page: what the server says is shown as text, never as markup; each error appears beside the control that caused it.

const RECORDING_SECONDS = 4;
const WATCHING_SECONDS = 2;
const get = (id) => document.getElementById(id);
const percent = (share) => (share > 0 && share < 0.005 ? "< 1 %" : share > 0.995 && share < 1 ? "> 99 %" : `${Math.round(100 * share)} %`);
let latest = { upload_bytes: Infinity, actions: [], questions: 0 }; // what the server said last
let camera = null; // { button, stop, closed } while the camera is on, for the button that began it

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(id, text, field) {
  get(id).textContent = text;
  if (field) field.setAttribute("aria-invalid", String(Boolean(text)));
}

// A request; progress gets the share of the body that was sent. Rejects with an Error whose text is for the reader.
function call(method, address, body = null, progress = () => {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, address);
    request.responseType = "json";
    request.upload.onprogress = (event) => progress(event.total ? event.loaded / event.total : 0);
    request.onload = () => {
      if (request.status < 400) resolve(request.response);
      else reject(new Error(sentence(request.response?.error ?? `the server refused this (status ${request.status})`)));
    };
    request.onerror = () => reject(new Error("The server cannot be reached. Is it still running?"));
    request.send(body);
  });
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// Actions.

function showActions(state) {
  latest = state;
  const list = element("ul", { className: "list card" });
  for (const action of state.actions) list.append(actionItem(action));
  const empty = element("p", { className: "empty", textContent: "No actions yet. Add at least two, with a clip or more of each." });
  get("actions").replaceChildren(state.actions.length ? list : empty);
  get("names").replaceChildren(...state.actions.map((action) => element("option", { value: action.name })));
  showHint();
  get("kept").textContent = state.kept
    ? "what was learned from them is kept in a folder of the server, where whoever runs it can see it, until you remove the action."
    : `what was learned from them stays in the server's memory until you remove the action, or for ${state.idle_minutes} minutes after you last used it.`;
}

// Whether there are clips enough for the choice made of when to answer "unknown".
function showHint() {
  const share = Number(get("unknown").value);
  const needed = share > 0 ? Math.ceil(1 / share) - 1 : 0;
  const missing = latest.actions.length > 0 && latest.questions < needed;
  get("unknown-hint").textContent = missing
    ? `Not yet: that takes ${needed} clips of actions with two clips or more, and there are ${latest.questions}. Until then no clip is “unknown”.`
    : "";
}

function actionItem(action) {
  const number = action.clips.length + action.others;
  const remove = element("button", { type: "button", className: "small", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove ${action.name}`);
  remove.onclick = async () => {
    remove.disabled = true;
    show("actions-error", "");
    try {
      showActions(await call("DELETE", `/api/actions?action=${encodeURIComponent(action.name)}`));
      teach.status(`Removed “${action.name}”.`);
      get("action").focus(); // the button that had the focus is gone
    } catch (error) {
      show("actions-error", error.message);
      remove.disabled = false;
    }
  };
  const pictures = action.clips.map((clip) => element("li", {}, element("img", { src: `/api/clips/${clip.number}`, alt: clip.name, title: clip.name })));
  const count = element("span", { className: "count", textContent: number === 1 ? "1 clip" : `${number} clips` });
  const title = element("header", {}, element("h3", { textContent: action.name }), count, remove);
  const item = element("li", { className: "action" }, title);
  if (pictures.length) item.append(element("ul", { className: "clips" }, ...pictures));
  return item;
}

// What both forms have: files or recordings that are sent one after the other.

class ClipForm {
  constructor(form, send) {
    this.form = form;
    this.send = send;
    this.file = form.querySelector("[type=file]");
    this.error = `${form.id}-error`;
    this.cameraError = `${form.id}-camera-error`;
    this.recordButton = form.querySelector(".record");
    this.progress = form.querySelector(".progress");
    this.preview = form.querySelector(".preview");
    this.file.onchange = () => show(this.error, "", this.file);
    this.recordButton.onclick = () => (camera?.button === this.recordButton ? camera.stop() : this.record());
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!this.ready()) return;
      const files = [...this.file.files];
      if (files.length) this.sendAll(files);
      else this.failFile("Choose a clip first.");
    };
  }

  ready() {
    return !this.busy;
  }

  failFile(text) {
    show(this.error, text, this.file);
    this.file.focus();
  }

  failCamera(text) {
    show(this.cameraError, text);
  }

  clearErrors() {
    show(this.error, "", this.file);
    show(this.cameraError, "");
  }

  status(text, share = null) {
    this.form.querySelector(".status").textContent = text;
    this.progress.hidden = !text || share === null;
    const bar = this.progress.querySelector("progress");
    if (share === null || share >= 1) bar.removeAttribute("value");
    else bar.value = share;
  }

  async sendAll(clips, recorded = false) {
    this.busy = true;
    const buttons = [...this.form.querySelectorAll("button")];
    buttons.forEach((button) => button.setAttribute("aria-disabled", "true"));
    this.clearErrors();
    const failures = [];
    for (const [place, clip] of clips.entries()) {
      const which = clips.length > 1 ? ` ${place + 1} of ${clips.length}` : "";
      try {
        await this.sendOne(clip, which);
      } catch (error) {
        failures.push(clips.length > 1 ? `${clip.name}: ${error.message}` : error.message);
      }
    }
    buttons.forEach((button) => button.removeAttribute("aria-disabled"));
    this.busy = false;
    this.status("");
    if (!failures.length) this.done(recorded);
    else if (recorded) this.failCamera(failures.join(" "));
    else this.failFile(failures.join(" "));
  }

  async sendOne(clip, which = "") {
    if (clip.size > latest.upload_bytes) {
      throw new Error(`The file is larger than ${latest.upload_bytes / 1e6} MB. Give a shorter or smaller clip.`);
    }
    this.status(`Sending clip${which} …`, 0);
    await this.send(clip, (share) => this.status(share < 1 ? `Sending clip${which} …` : `Reading clip${which} …`, share));
  }

  // Opens the camera and gives clips of so many seconds to onclip, until it returns false or stop is called.
  async useCamera(button, seconds, onclip) {
    let stream;
    this.clearErrors();
    camera?.stop();
    await camera?.closed; // whoever used it before
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } } });
    } catch (error) {
      this.failCamera(error.name === "NotFoundError" ? "No camera was found." : "The browser does not let this page use the camera.");
      return;
    }
    let more = true;
    let recorder = null;
    let close;
    const stop = () => {
      more = false;
      if (recorder?.state === "recording") recorder.stop();
    };
    camera = { button, stop, closed: new Promise((resolve) => { close = resolve; }) };
    this.preview.srcObject = stream;
    this.preview.hidden = false;
    await this.preview.play();
    try {
      while (more) {
        const parts = [];
        recorder = new MediaRecorder(stream, { videoBitsPerSecond: 1_500_000 });
        recorder.ondataavailable = (event) => parts.push(event.data);
        const stopped = new Promise((resolve) => { recorder.onstop = resolve; });
        recorder.start();
        const timer = setTimeout(() => recorder.state === "recording" && recorder.stop(), 1000 * seconds);
        await stopped;
        clearTimeout(timer);
        const clip = new File(parts, "recording", { type: recorder.mimeType });
        if (!(await onclip(clip, more))) break;
      }
    } finally {
      stream.getTracks().forEach((track) => track.stop());
      this.preview.hidden = true;
      this.preview.srcObject = null;
      camera = null;
      close();
    }
  }

  async record() {
    if (!this.ready()) return;
    this.busy = true;
    this.recordButton.textContent = "Stop";
    this.status(`Recording, ${RECORDING_SECONDS} seconds at most …`);
    let recorded = null;
    await this.useCamera(this.recordButton, RECORDING_SECONDS, (clip) => { recorded = clip; return false; });
    this.recordButton.textContent = "Record a clip";
    this.status("");
    this.busy = false;
    if (recorded) await this.sendAll([recorded], true);
  }
}

// Teaching.

const teach = new ClipForm(get("teach"), async (clip, progress) => {
  const asked = new URLSearchParams({ action: get("action").value, name: clip.name });
  showActions(await call("POST", `/api/clips?${asked}`, clip, progress));
});
teach.ready = () => {
  const named = get("action").value.trim() !== "";
  show("action-error", named ? "" : "Give the action a name.", get("action"));
  if (!named) get("action").focus();
  return named && !teach.busy;
};
teach.done = (recorded) => {
  if (!recorded) teach.file.value = "";
  teach.status(`Added to “${get("action").value.trim()}”.`);
};

// Asking.

async function recognise(clip, progress = () => {}) {
  const answer = await call("POST", `/api/answers?false_unknown=${get("unknown").value}`, clip, progress);
  showAnswer(answer, clip.name);
}
const ask = new ClipForm(get("ask"), (clip, progress) => {
  get("answer").hidden = true; // it is about another clip
  return recognise(clip, progress);
});
ask.done = () => {};

get("unknown").onchange = showHint;

const live = get("ask").querySelector(".live");
live.onclick = async () => {
  if (camera?.button === live) return camera.stop();
  if (ask.busy) return;
  live.setAttribute("aria-pressed", "true");
  live.textContent = "Stop watching";
  ask.status(`Watching: an answer every ${WATCHING_SECONDS} seconds.`);
  await ask.useCamera(live, WATCHING_SECONDS, async (clip, more) => {
    if (!more) return false;
    try {
      await recognise(clip);
      return true;
    } catch (error) {
      ask.failCamera(error.message);
      return false;
    }
  });
  live.setAttribute("aria-pressed", "false");
  live.textContent = "Watch the camera";
  ask.status("");
};

function showAnswer(answer, name) {
  get("answer").hidden = false;
  get("answer-clip").textContent = name;
  const shares = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  const sure = answer.known
    ? `with a probability of ${percent(answer.confidence)}`
    : `It looks like none of your actions. Nearest is ${shares[0][0]}.`;
  const label = answer.known ? answer.label : "Unknown";
  if (get("said").textContent !== label) get("said").textContent = label;
  get("answer-label").replaceChildren(label, element("small", { textContent: sure }));
  get("shares").replaceChildren(...shares.map(([action, share]) => shareItem(action, share)));
  showViews(answer, shares.map(([action]) => action));
}

function shareItem(action, share) {
  const bar = element("i");
  bar.style.width = `${100 * share}%`;
  const track = element("span", { className: "track" }, bar);
  return element("li", {}, element("span", { textContent: action }), element("span", { textContent: percent(share) }), track);
}

function showViews(answer, actions) {
  const views = Object.keys(answer.policy);
  const row = (className, title, cells) => {
    const made = element("tr", { className }, element("th", { scope: "row", textContent: title }));
    made.append(...cells);
    return made;
  };
  const cell = (share, best = false) => element("td", { className: best ? "best" : "", textContent: share === undefined ? "–" : percent(share) });
  const head = element("tr", {}, element("td", { textContent: "" }), ...views.map((view) => element("th", { scope: "col", textContent: view })));
  const best = (view) => Math.max(...Object.values(answer.views[view] ?? {}));
  const rows = actions.map((action) => row("", action, views.map((view) => {
    const share = answer.views[view]?.[action];
    return cell(share, share === best(view));
  })));
  const trust = row("trust", "Trust", views.map((view) => cell(answer.policy[view])));
  get("views").replaceChildren(element("thead", {}, head), element("tbody", {}, trust, ...rows));
}

// Start.

if (location.search.includes("token=")) history.replaceState(null, "", location.pathname); // it is in a cookie now
if (!navigator.mediaDevices || !window.MediaRecorder) {
  document.querySelectorAll(".record, .live").forEach((button) => { button.hidden = true; });
  get("camera-hint").hidden = false;
}
call("GET", "/api/actions").then(showActions, (error) => show("actions-error", error.message));
