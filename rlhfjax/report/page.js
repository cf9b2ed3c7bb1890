
"use strict";
// Three views (curves, points, samples) of the data beside them, and tables that can be sorted. Texts are only ever set
// as text, never as HTML. The functions above `views` know nothing of the page.

const STYLES = 6;  // colours; a curve beyond them is dashed
const DASHES = ["", "6 4", "2 3", "10 3 2 3"];

function format(value) {
  if (value === null || value === undefined) return "none";
  if (Number.isInteger(value)) return Math.abs(value) < 1e6 ? String(value) : value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

// Round numbers that cover [low, high], about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// The range of some numbers, widened a little, and never empty.
function range(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null && v !== undefined) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  const margin = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
  return [low - margin, high + margin];
}

// The centred mean of `window` points, at the ends of those that exist; gaps stay gaps.
function smoothed(values, window) {
  const half = Math.floor(window / 2);
  return values.map((own, i) => {
    if (own === null || own === undefined) return null;
    let total = 0, count = 0;
    for (const v of values.slice(Math.max(0, i - half), i + half + 1)) if (v !== null && v !== undefined) { total += v; count++; }
    return total / count;
  });
}

// Words of two texts: [["same" | "left" | "right", text], ...], by their longest common subsequence.
function wordDifference(left, right) {
  const split = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];
  const a = split(left), b = split(right), most = 4e6;
  if (a.length * b.length > most) return [["left", left], ["right", right]];
  const width = b.length + 1, table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i * width + j] = a[i] === b[j]
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const found = [];
  const add = (kind, word) => {
    const last = found[found.length - 1];
    if (last && last[0] === kind) last[1] += word; else found.push([kind, word]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { add("same", a[i]); i++; j++; }
    else if (j === b.length || (i < a.length && table[(i + 1) * width + j] >= table[i * width + j + 1])) add("left", a[i++]);
    else add("right", b[j++]);
  }
  return found;
}

// The number that a cell begins with, NaN where it begins with none.
function leading(text) {
  const found = text.trim().match(/^[-+−]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?/i);
  return found ? Number(found[0].replace(/,/g, "").replace("−", "-")) : NaN;
}

// Numbers before words, and words by the alphabet; empty cells last, whichever way.
function compareCells(a, b, sign) {
  if (!a.trim() || !b.trim()) return (a.trim() ? 0 : 1) - (b.trim() ? 0 : 1);
  const x = leading(a), y = leading(b);
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
  return sign * (isNaN(x) ? a.localeCompare(b) : x - y);
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((v, i) => { if (v !== null && Math.abs(v - wanted) < Math.abs((values[best] ?? Infinity) - wanted)) best = i; });
  return best;
}

// ---- the page

function element(name, attributes = {}, children = []) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[].concat(children));
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A labelled choice among [value, words] pairs.
function choice(label, changed) {
  const select = element("select");
  select.addEventListener("change", changed);
  const offer = (pairs) => {
    const before = select.value;
    select.replaceChildren(...pairs.map(([value, words]) => element("option", { value }, words)));
    if (pairs.some(([value]) => value === before)) select.value = before;
  };
  return { box: element("label", {}, [label, select]), select, offer };
}

function frameOf(box, xRange, yRange, xName) {
  const width = Math.max(280, Math.min(1000, box.clientWidth || 700)), height = Math.round(Math.min(360, Math.max(220, width * 0.45)));
  const [left, right, top, bottom] = [58, width - 12, 10, height - 38];
  const x = (v) => left + (v - xRange[0]) / (xRange[1] - xRange[0]) * (right - left);
  const y = (v) => bottom - (v - yRange[0]) / (yRange[1] - yRange[0]) * (bottom - top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const t of ticks(yRange[0], yRange[1], 5)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) }));
    svg.append(shape("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, format(t)));
  }
  for (const t of ticks(xRange[0], xRange[1], width / 110)) {
    svg.append(shape("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: bottom }));
    svg.append(shape("text", { x: x(t), y: bottom + 16, "text-anchor": "middle" }, format(t)));
  }
  svg.append(shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  svg.append(shape("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, xName));
  return { svg, x, y, left, right, top, bottom, width };
}

function pathOf(xs, ys, frame) {
  let path = "", pen = false;
  xs.forEach((x, i) => {
    if (x === null || x === undefined || ys[i] === null || ys[i] === undefined) { pen = false; return; }
    path += `${pen ? "L" : "M"}${frame.x(x).toFixed(1)} ${frame.y(ys[i]).toFixed(1)}`;
    pen = true;
  });
  return path;
}

function legend(labels) {
  const items = labels.map((label, i) => {
    const line = shape("line", { class: `s${i % STYLES}`, x1: 0, x2: 34, y1: 5, y2: 5, "stroke-width": 3, "stroke-dasharray": DASHES[Math.floor(i / STYLES) % DASHES.length] });
    const key = shape("svg", { viewBox: "0 0 34 10", "aria-hidden": "true" });
    key.append(line);
    return element("li", {}, [key, label]);
  });
  return element("ul", { class: "legend" }, items);
}

function tableOf(header, rows, caption) {
  const head = element("tr", {}, header.map((words) => element("th", { scope: "col" }, words)));
  const body = rows.map(([first, ...rest]) => element("tr", {}, [element("th", { scope: "row" }, first), ...rest.map((cell) => element("td", {}, cell))]));
  const table = element("table", {}, [element("caption", { class: "unseen" }, caption), element("thead", {}, head), element("tbody", {}, body)]);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}

// data: stage -> curves, each {label, step, values: {metric: numbers}, low?, high?: as values}.
function curvesView(figure, data) {
  const stage = choice("stage", () => { offerMetrics(); draw(); });
  const metric = choice("metric", () => draw());
  const across = choice("against", () => draw());
  const smooth = element("input", { type: "checkbox" });
  smooth.addEventListener("change", () => draw());
  const place = element("div"), slider = element("input", { type: "range", min: 0, value: 0 }), told = element("output", { "aria-live": "polite" });
  const more = element("details", {}, [element("summary", {}, "The values as a table"), element("div")]);
  const choices = [stage.box, metric.box, across.box, element("label", { class: "beside" }, [smooth, "smooth"])];
  figure.prepend(element("div", { class: "choices" }, choices), place, element("label", {}, [element("span", { class: "unseen" }, "point to read off"), slider]), told, more);
  const names = (own) => [...new Set(own.flatMap((curve) => Object.keys(curve.values)))].sort();
  const preferred = ["objective/score", "objective/reward", "greedy/return", "game/score", "loss/total", "loss/nll"];
  let cursor = () => {};

  function offerMetrics() {
    const found = names(data[stage.select.value]), before = metric.select.value;
    metric.offer(found.map((name) => [name, name]));
    if (!found.includes(before)) metric.select.value = preferred.find((name) => found.includes(name)) || found[0];
    const against = ["objective/kl", "environment_steps", "updates"].filter((name) => found.includes(name));
    across.offer([["step", "step"], ...against.map((name) => [name, name])]);
  }

  function draw() {
    const name = metric.select.value, xName = across.select.value;
    const own = data[stage.select.value].filter((curve) => curve.values[name]);
    const window = smooth.checked ? Math.max(3, Math.floor(Math.max(...own.map((c) => c.step.length)) / 15) | 1) : 1;
    const lines = own.map((curve) => {
      const x = xName === "step" ? curve.step : curve.values[xName] || curve.step.map(() => null);
      const pick = (of) => of && of[name] ? smoothed(of[name], window) : null;
      return { label: curve.label, x, step: curve.step, y: smoothed(curve.values[name], window), low: pick(curve.low), high: pick(curve.high) };
    });
    const xs = lines.flatMap((line) => line.x), ys = lines.flatMap((line) => [line.y, line.low || [], line.high || []].flat());
    const xRange = xName === "step" ? [Math.min(...xs), Math.max(Math.max(...xs), Math.min(...xs) + 1)] : range(xs);
    const frame = frameOf(figure, xRange, range(ys), xName);
    lines.forEach((line, i) => {
      const style = `s${i % STYLES}`;
      if (line.low) {
        const back = pathOf([...line.x].reverse(), [...line.low].reverse(), frame).replace(/^M/, "L");
        frame.svg.append(shape("path", { class: `band ${style}`, d: pathOf(line.x, line.high, frame) + back + "Z" }));
      }
      frame.svg.append(shape("path", { class: `${style} curve`, d: pathOf(line.x, line.y, frame), "stroke-dasharray": DASHES[Math.floor(i / STYLES) % DASHES.length] }));
    });
    frame.svg.querySelectorAll(".curve").forEach((path) => { path.style.fill = "none"; });
    const rule = shape("line", { class: "cursor", y1: frame.top, y2: frame.bottom });
    const dots = lines.map((_, i) => shape("circle", { class: `s${i % STYLES}`, r: 3.5 }));
    frame.svg.append(rule, ...dots);
    const longest = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    frame.svg.setAttribute("aria-label", describe(lines, name, xName));
    place.replaceChildren(frame.svg, ...(lines.length > 1 ? [legend(lines.map((line) => line.label))] : []));
    more.lastChild.replaceChildren();
    if (more.open) fillTable();
    cursor = () => {
      const at = longest.x[slider.value] ?? longest.x.find((v) => v !== null);
      const words = lines.map((line, i) => {
        const k = nearest(line.x, at), there = line.y[k] !== null && line.x[k] !== null;
        dots[i].setAttribute("visibility", there ? "visible" : "hidden");
        if (there) { dots[i].setAttribute("cx", frame.x(line.x[k])); dots[i].setAttribute("cy", frame.y(line.y[k])); }
        const between = line.low && line.low[k] !== null ? ` [${format(line.low[k])}, ${format(line.high[k])}]` : "";
        return `${line.label ? `${line.label}: ` : ""}${format(line.y[k])}${between}`;
      });
      rule.setAttribute("x1", frame.x(at)); rule.setAttribute("x2", frame.x(at));
      told.textContent = `${xName} ${format(at)}; ${name} ${words.join("; ")}`;
      slider.setAttribute("aria-valuetext", told.textContent);
    };
    slider.max = longest.x.length - 1;
    slider.value = slider.max;
    frame.svg.addEventListener("pointermove", (event) => {
      const box = frame.svg.getBoundingClientRect(), pixel = (event.clientX - box.left) / box.width * frame.width;
      const wanted = xRange[0] + (pixel - frame.left) / (frame.right - frame.left) * (xRange[1] - xRange[0]);
      slider.value = nearest(longest.x, wanted);
      cursor();
    });
    cursor();

    function fillTable() {
      const every = Math.max(1, Math.ceil(longest.x.length / 40));
      const rows = longest.x.map((x, i) => [x, i]).filter(([x, i]) => x !== null && (i % every === 0 || i === longest.x.length - 1));
      const header = [xName, ...lines.map((line) => line.label || name)];
      more.lastChild.replaceChildren(tableOf(header, rows.map(([x]) => [format(x), ...lines.map((line) => format(line.y[nearest(line.x, x)]))]), `${name} against ${xName}`));
    }
    more.ontoggle = () => { if (more.open) fillTable(); };
  }

  function describe(lines, name, xName) {
    const parts = lines.map((line) => {
      const known = line.y.filter((v) => v !== null);
      return `${line.label || "the curve"} goes from ${format(known[0])} to ${format(known[known.length - 1])}, lowest ${format(Math.min(...known))}, highest ${format(Math.max(...known))}`;
    });
    return `${name} against ${xName}: ${parts.join("; ")}`;
  }

  const stages = Object.keys(data);
  stage.offer(stages.map((name) => [name, name]));
  stage.select.value = stages.reduce((best, name) => (names(data[name]).length > names(data[best]).length ? name : best), stages[0]);
  slider.addEventListener("input", () => cursor());
  offerMetrics();
  draw();
  window.addEventListener("resize", () => draw());
}

// data: {x, y, points: [{group, label, x, y, low, high}]}: names of the axes, and points with the interval of their y.
function pointsView(figure, data) {
  const place = element("div"), told = element("output", { "aria-live": "polite" }, "Point at a mark, or read the table below.");
  figure.prepend(place, told);
  const groups = [...new Set(data.points.map((p) => p.group))];
  function draw() {
    const frame = frameOf(figure, range(data.points.map((p) => p.x)), range(data.points.flatMap((p) => [p.y, p.low, p.high])), data.x);
    frame.svg.append(shape("text", { x: frame.left + 4, y: frame.top + 10 }, data.y));
    frame.svg.setAttribute("aria-label", `${data.y} against ${data.x}: ${data.points.length} points; the table has their numbers`);
    for (const p of data.points) {
      const i = groups.indexOf(p.group), style = `s${i % STYLES}`, [x, y] = [frame.x(p.x), frame.y(p.y)];
      if (p.low !== null) frame.svg.append(shape("line", { class: `${style} arm`, x1: x, x2: x, y1: frame.y(p.low), y2: frame.y(p.high) }));
      const mark = shape("circle", { class: `${style}${i >= STYLES ? " hollow" : ""}`, cx: x, cy: y, r: 5 });
      const words = `${p.label}: ${data.y} ${format(p.y)}${p.low === null ? "" : ` [${format(p.low)}, ${format(p.high)}]`}, ${data.x} ${format(p.x)}`;
      mark.append(shape("title", {}, words));
      mark.addEventListener("pointerenter", () => { told.textContent = words; });
      frame.svg.append(mark);
    }
    place.replaceChildren(frame.svg, legend(groups));
  }
  draw();
  window.addEventListener("resize", draw);
}

// data: {prompts: [text], sources: [{label, texts: {number of the prompt: text}}]}.
function samplesView(figure, data) {
  const left = choice("left", () => offerPrompts()), right = choice("right", () => offerPrompts()), prompt = choice("prompt", () => show());
  const marked = element("input", { type: "checkbox" });
  marked.checked = true;
  marked.addEventListener("change", () => show());
  const step = (by) => () => {
    const count = prompt.select.options.length;
    prompt.select.selectedIndex = (prompt.select.selectedIndex + by + count) % count;
    show();
  };
  const buttons = [["previous", -1], ["next", 1]].map(([words, by]) => {
    const button = element("button", { type: "button" }, words);
    button.addEventListener("click", step(by));
    return button;
  });
  const place = element("div", { "aria-live": "polite" });
  figure.prepend(element("div", { class: "choices" }, [left.box, right.box, prompt.box, ...buttons, element("label", { class: "beside" }, [marked, "mark differences"])]), place);
  const common = (a, b) => Object.keys(data.sources[a].texts).filter((key) => key in data.sources[b].texts);

  // Offered beside the left one: what answers some of its prompts.
  function offerRight() {
    const others = data.sources.map((source, i) => [String(i), source.label]).filter(([i]) => common(left.select.value, i).length);
    right.offer(others);
  }

  function offerPrompts() {
    offerRight();
    prompt.offer(common(left.select.value, right.select.value).map((key) => [key, data.prompts[key].replace(/\s+/g, " ").slice(0, 70)]));
    show();
  }

  function side(label, pieces, tag, plain) {
    const text = element("div", { class: plain ? "text frame" : "text" }, pieces.map(([kind, words]) => (kind === "same" || !marked.checked ? words : element(tag, {}, words))));
    return element("div", {}, [element("h3", {}, label), text]);
  }

  function show() {
    const key = prompt.select.value, a = data.sources[left.select.value], b = data.sources[right.select.value];
    if (key === "") { place.replaceChildren("There is no prompt that both answer."); return; }
    const pieces = wordDifference(a.texts[key], b.texts[key]);
    const drawn = /\n.*\n/.test(a.texts[key]);
    const shown = element("div", { class: "prompt" }, [element("span", { class: "unseen" }, "Prompt: "), element("span", { class: "text" }, data.prompts[key])]);
    const both = [side(a.label, pieces.filter(([kind]) => kind !== "right"), "del", drawn)];
    if (a !== b) both.push(side(b.label, pieces.filter(([kind]) => kind !== "left"), "ins", drawn));
    place.replaceChildren(shown, element("div", { class: "pair" }, both));
  }

  left.offer(data.sources.map((source, i) => [String(i), source.label]));
  // To begin with: the two sources that share the most prompts, decoded alike if their names tell; the last such pair.
  let best = [0, 0, 0];
  const ending = (i) => data.sources[i].label.split(", ").pop();
  data.sources.forEach((_, j) => {
    for (let i = 0; i < j; i++) {
      const worth = common(i, j).length * 2 + (ending(i) === ending(j) ? 1 : 0);
      if (worth >= best[2]) best = [i, j, worth];
    }
  });
  left.select.value = String(best[0]);
  offerRight();
  right.select.value = String(best[1]);
  offerPrompts();
}

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", title: "sort" }, [...head.childNodes]);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent;
      body.append(...[...rows].sort((a, b) => compareCells(text(a), text(b), sign)));
    });
  });
}

const views = { curves: curvesView, points: pointsView, samples: samplesView };

if (typeof document !== "undefined") {
  for (const figure of document.querySelectorAll("[data-view]")) {
    views[figure.dataset.view](figure, JSON.parse(figure.querySelector("script").textContent));
  }
  for (const table of document.querySelectorAll("table.sortable")) if (table.tBodies[0].rows.length > 1) sortable(table);
} else {
  module.exports = { ticks, range, smoothed, wordDifference, compareCells, nearest, format };
}
