const byId = (id) => document.getElementById(id);
// Characters that are not seen, or that turn the text around them: shown by their number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;
let annotator = settings.annotator;
let state = null; // what the server said last
let since = 0; // when the pair was shown
let busy = false;

function put(element, text) {
  element.replaceChildren();
  if (text === "") {
    const empty = document.createElement("span");
    empty.className = "empty";
    empty.textContent = "(no text)";
    element.append(empty);
    return;
  }
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    element.append(text.slice(from, found.index));
    const mark = document.createElement("span");
    mark.className = "control";
    mark.dir = "ltr";
    mark.textContent = "U+" + found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    element.append(mark);
    from = found.index + found[0].length;
  }
  element.append(text.slice(from));
}

function article(text, i) {
  const box = document.createElement("article");
  const title = document.createElement("h2");
  title.id = "title-" + i;
  title.textContent = "Completion " + (i + 1);
  const body = document.createElement("div");
  body.className = "text";
  body.dir = "auto";
  body.tabIndex = 0; // long texts scroll by keyboard
  body.setAttribute("role", "region");
  body.setAttribute("aria-labelledby", title.id);
  put(body, text);
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-keyshortcuts", String(i + 1));
  const key = document.createElement("kbd");
  key.textContent = String(i + 1);
  button.append(key, " Completion " + (i + 1) + " is better");
  button.addEventListener("click", () => answer(i));
  box.append(title, body, button);
  return box;
}

function show(found) {
  state = found;
  byId("error").textContent = "";
  byId("notice").textContent = found.notice;
  byId("name-form").hidden = true;
  byId("progress-line").hidden = false;
  byId("who").textContent = "as " + found.annotator;
  byId("bar").max = Math.max(1, found.total);
  byId("bar").value = found.done;
  byId("undo").hidden = found.last === null;
  for (const id of ["task", "tie", "skip"]) byId(id).hidden = found.task === null;
  byId("end").hidden = found.task !== null;
  if (found.task === null) {
    byId("progress").textContent = found.done + " of " + found.total + " answered";
    byId("end-title").focus();
    return;
  }
  byId("progress").textContent = found.done + 1 + " of " + found.total;
  put(byId("prompt"), found.task.prompt);
  byId("completions").replaceChildren(...found.task.completions.map(article));
  for (const box of document.querySelectorAll(".text")) box.scrollTop = 0;
  window.scrollTo(0, 0);
  byId("prompt-title").focus({ preventScroll: true }); // a screen reader goes on from here
  since = performance.now();
}

async function ask(route, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let reply;
  try {
    reply = await fetch(route, options);
  } catch {
    throw Error("The program does not answer. Nothing is lost: start it again and open the address that it prints.");
  }
  const found = await reply.json();
  if (!reply.ok) throw Object.assign(Error(found.error), { status: reply.status });
  return found;
}

async function alone(work) {
  if (busy) return; // one request at a time: a second key press is not an answer to the next pair
  busy = true;
  try {
    show(await work());
    if (byId("panel").open) await numbers();
  } catch (error) {
    if (error.status === 409) {
      await ask(next()).then(show, () => {});
    }
    byId("error").textContent = error.message;
    if (state === null) askName();
  } finally {
    busy = false;
  }
}

const next = () => "task?annotator=" + encodeURIComponent(annotator);

function answer(choice) {
  const { key, label } = state.task;
  const seconds = (performance.now() - since) / 1000;
  alone(() => ask("label", { annotator, key, label, choice, seconds }));
}

const undo = () => alone(() => ask("undo", { annotator, label: state.last }));

async function numbers() {
  const { tables } = await ask("numbers");
  byId("tables").replaceChildren(...tables.map((given) => {
    const table = document.createElement("table");
    table.createCaption().textContent = given.title;
    const head = table.createTHead().insertRow();
    for (const name of given.header) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of given.rows) {
      const line = body.insertRow();
      row.forEach((text, i) => {
        const cell = document.createElement(i === 0 ? "th" : "td");
        if (i === 0) cell.scope = "row";
        put(cell, text === "" ? " " : text);
        line.append(cell);
      });
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", given.title);
    scroll.append(table);
    return scroll;
  }));
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  if (state === null) return;
  const key = event.key.toLowerCase();
  if (key === "u" && state.last !== null) {
    undo();
  } else if (state.task === null) {
    return;
  } else if (key === "0") {
    answer("tie");
  } else if (key === "s") {
    answer("skip");
  } else if (/^[1-9]$/.test(key) && Number(key) <= state.task.completions.length) {
    answer(Number(key) - 1);
  } else {
    return;
  }
  event.preventDefault();
});

byId("tie").addEventListener("click", () => answer("tie"));
byId("skip").addEventListener("click", () => answer("skip"));
byId("undo").addEventListener("click", undo);
byId("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = byId("name").value.trim();
  sessionStorage.setItem("annotator", annotator);
  alone(() => ask(next()));
});
byId("panel").hidden = !settings.panel;
byId("panel").addEventListener("toggle", () => {
  if (byId("panel").open) numbers().catch((error) => { byId("error").textContent = error.message; });
});

function askName() {
  byId("name-form").hidden = false;
  byId("name").focus();
}

annotator = annotator || sessionStorage.getItem("annotator") || "";
if (annotator) {
  alone(() => ask(next()));
} else {
  askName();
}
