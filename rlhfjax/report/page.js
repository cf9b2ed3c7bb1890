
"use strict";
// Three views (curves, points, samples) of the data beside them, and tables that can be sorted. Texts are only ever set
// as text, never as HTML. The functions above `views` know nothing of the page.

const STYLES = 6;  // colours; a curve beyond them is dashed
const DASHES = ["", "6 4", "2 3", "10 3 2 3"];

function format(value) {
  if (value === null || value === undefined) return "none";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  if (Math.abs(value) >= 1e4) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

// Labels of ticks, all with the same number of decimals.
function tickLabels(values) {
  const largest = Math.max(...values.map(Math.abs)), step = values.length > 1 ? Math.abs(values[1] - values[0]) : largest || 1;
  if (largest >= 1e6) {
    const short = values.map((v) => v.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 }));
    if (new Set(short).size === short.length) return short;
  }
  if (step < 1e-4) return values.map((v) => (v === 0 ? "0" : Number(v.toPrecision(6)).toExponential()));
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((v) => v.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }));
}

// Round numbers that cover [low, high], about `count` of them, at least `least` apart.
function ticks(low, high, count, least = 0) {
  const rough = Math.max(least, (high - low) / Math.max(1, count));
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

// The places of the points that are known, in unbroken stretches: [[0, 1, 2], [5], ...].
function stretches(...columns) {
  const found = [];
  let open = null;
  columns[0].forEach((_, i) => {
    if (columns.some((values) => values[i] === null || values[i] === undefined)) { open = null; return; }
    if (open === null) found.push(open = []);
    open.push(i);
  });
  return found;
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

// A phone's bars come and go as one scrolls: only another width needs another drawing.
function onResize(box, draw) {
  let width = box.clientWidth;
  window.addEventListener("resize", () => { if (box.clientWidth !== width) { width = box.clientWidth; draw(); } });
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

// The axes of a plot; `xLeast`: the least distance of ticks on x (1 where x counts).
function frameOf(box, xRange, yRange, xName, yName, xLeast = 0) {
  const width = Math.max(280, Math.min(1000, box.clientWidth || 700)), height = Math.round(Math.min(380, Math.max(240, width * 0.45)));
  const yTicks = ticks(yRange[0], yRange[1], 5), yLabels = tickLabels(yTicks);
  const xTicks = ticks(xRange[0], xRange[1], width / (width < 500 ? 70 : 110), xLeast), xLabels = tickLabels(xTicks);
  const [left, right, top, bottom] = [16 + 7 * Math.max(...yLabels.map((label) => label.length)), width - 16, 28, height - 38];
  const x = (v) => left + (v - xRange[0]) / (xRange[1] - xRange[0]) * (right - left);
  const y = (v) => bottom - (v - yRange[0]) / (yRange[1] - yRange[0]) * (bottom - top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  yTicks.forEach((t, i) => {
    svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) }));
    svg.append(shape("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, yLabels[i]));
  });
  xTicks.forEach((t, i) => {
    svg.append(shape("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: bottom }));
    svg.append(shape("text", { x: x(t), y: bottom + 16, "text-anchor": "middle" }, xLabels[i]));
  });
  svg.append(shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  svg.append(shape("text", { class: "name", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, xName));
  svg.append(shape("text", { class: "name", x: 4, y: 14 }, yName));
  return { svg, x, y, left, right, top, bottom, width };
}

function pathOf(xs, ys, frame) {
  return stretches(xs, ys).map((own) => `M${own.map((i) => `${frame.x(xs[i]).toFixed(1)} ${frame.y(ys[i]).toFixed(1)}`).join("L")}`).join("");
}

// The area between two curves, one closed piece for each stretch in which both are known.
function bandOf(xs, lows, highs, frame) {
  const along = (own, ys) => own.map((i) => `${frame.x(xs[i]).toFixed(1)} ${frame.y(ys[i]).toFixed(1)}`);
  return stretches(xs, lows, highs).map((own) => `M${[...along(own, highs), ...along([...own].reverse(), lows)].join("L")}Z`).join("");
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

// {units: {metric: its unit}, stages: stage -> curves}, each {label, step, values: {metric: numbers}, low?, high?: as
// values}.
function curvesView(figure, { units, stages: data }) {
  const stage = choice("stage", () => { offerMetrics(); draw(); });
  const metric = choice("metric", () => draw());
  const across = choice("against", () => draw());
  const smooth = element("input", { type: "checkbox" });
  smooth.addEventListener("change", () => draw());
  const place = element("div"), slider = element("input", { type: "range", min: 0, value: 0 }), told = element("output", { "aria-live": "polite" });
  const more = element("details", {}, [element("summary", {}, "The values as a table"), element("div")]);
  const choices = [stage.box, metric.box, across.box, element("label", { class: "beside" }, [smooth, "smooth"])];
  figure.prepend(element("div", { class: "choices" }, choices), place, element("label", {}, [element("span", { class: "unseen" }, "point to read off"), slider]), told, more);
  const all = "all stages";  // on one plot, where methods are stages of their own
  if (Object.keys(data).length > 1) {
    data = { ...data, [all]: Object.entries(data).flatMap(([name, own]) => own.map((curve) => ({ ...curve, label: curve.label ? `${curve.label}, ${name}` : name }))) };
  }
  const names = (own) => [...new Set(own.flatMap((curve) => Object.keys(curve.values)))].sort();
  const withUnit = (name) => (units[name] && !name.endsWith(units[name]) ? `${name} (${units[name]})` : name);
  const preferred = ["objective/score", "objective/reward", "greedy/return", "game/score", "loss/total", "loss/nll"];
  let cursor = () => {};

  function offerMetrics() {
    const found = names(data[stage.select.value]), before = metric.select.value;
    metric.offer(found.map((name) => [name, name]));
    if (!found.includes(before)) metric.select.value = preferred.find((name) => found.includes(name)) || found[0];
    const against = ["objective/kl", "environment_steps so far", "updates"].filter((name) => found.includes(name));
    across.offer([["step", "step"], ...against.map((name) => [name, name])]);
  }

  function draw() {
    const name = metric.select.value, xName = across.select.value;
    const own = data[stage.select.value].filter((curve) => curve.values[name] && (xName === "step" || curve.values[xName]));
    const window = smooth.checked ? Math.max(3, Math.floor(Math.max(...own.map((c) => c.step.length)) / 15) | 1) : 1;
    const lines = own.map((curve) => {
      const x = xName === "step" ? curve.step : curve.values[xName];
      const pick = (of) => of && of[name] ? smoothed(of[name], window) : null;
      return { label: curve.label, x, step: curve.step, y: smoothed(curve.values[name], window), low: pick(curve.low), high: pick(curve.high) };
    });
    const xs = lines.flatMap((line) => line.x), ys = lines.flatMap((line) => [line.y, line.low || [], line.high || []].flat());
    const xRange = xName === "step" ? [Math.min(...xs), Math.max(Math.max(...xs), Math.min(...xs) + 1)] : range(xs);
    const frame = frameOf(figure, xRange, range(ys), withUnit(xName), `${stage.select.value}: ${withUnit(name)}`, xName === "step" ? 1 : 0);
    lines.forEach((line, i) => {
      const style = `s${i % STYLES}`;
      if (line.low) frame.svg.append(shape("path", { class: `band ${style}`, d: bandOf(line.x, line.low, line.high, frame) }));
      frame.svg.append(shape("path", { class: `${style} curve`, d: pathOf(line.x, line.y, frame), "stroke-dasharray": DASHES[Math.floor(i / STYLES) % DASHES.length] }));
    });
    // A value with none beside it has no line to be part of.
    lines.forEach((line, i) => stretches(line.x, line.y).filter((part) => part.length === 1).forEach(([k]) => {
      frame.svg.append(shape("circle", { class: `s${i % STYLES} alone`, r: 2.5, cx: frame.x(line.x[k]), cy: frame.y(line.y[k]) }));
    }));
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
        const place = there && line.x[k] !== at ? ` (at ${format(line.x[k])})` : "";
        return `${line.label ? `${line.label}: ` : ""}${format(line.y[k])}${between}${place}`;
      });
      rule.setAttribute("x1", frame.x(at)); rule.setAttribute("x2", frame.x(at));
      const how = window > 1 ? `, means of ${window} points` : "";
      told.textContent = `${xName} ${format(at)}; ${name}${how}${lines.length > 1 ? ":" : ""} ${words.join("; ")}`;
      slider.setAttribute("aria-valuetext", told.textContent);
    };
    slider.max = longest.x.length - 1;
    slider.value = slider.max;
    const follow = (event) => {
      const box = frame.svg.getBoundingClientRect(), pixel = (event.clientX - box.left) / box.width * frame.width;
      const wanted = xRange[0] + (pixel - frame.left) / (frame.right - frame.left) * (xRange[1] - xRange[0]);
      slider.value = nearest(longest.x, wanted);
      cursor();
    };
    frame.svg.addEventListener("pointermove", follow);
    frame.svg.addEventListener("pointerdown", follow);
    cursor();

    function fillTable() {
      const steps = [...new Set(lines.flatMap((line) => line.step))].sort((a, b) => a - b);
      const every = Math.ceil(steps.length / 40);
      const shown = steps.filter((_, i) => i % every === 0 || i === steps.length - 1);
      const columns = lines.flatMap((line) => (xName === "step" ? [[line.label || name, line.step, line.y]] : [
        [line.label ? `${line.label}: ${xName}` : xName, line.step, line.x],
        [line.label ? `${line.label}: ${name}` : name, line.step, line.y],
      ]));
      const rows = shown.map((step) => [format(step), ...columns.map(([, own, values]) => (own.includes(step) ? format(values[own.indexOf(step)]) : ""))]);
      more.lastChild.replaceChildren(tableOf(["step", ...columns.map(([words]) => words)], rows, `${name} against ${xName}`));
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
  // To begin with: the stage that shows the most; all, if the first of the preferred metrics is of several.
  const single = stages.filter((name) => name !== all);
  const first = preferred.find((name) => single.some((own) => names(data[own]).includes(name)));
  stage.select.value = single.filter((own) => names(data[own]).includes(first)).length > 1
    ? all : single.reduce((best, name) => (names(data[name]).length > names(data[best]).length ? name : best), single[0]);
  slider.addEventListener("input", () => cursor());
  offerMetrics();
  draw();
  onResize(figure, () => { const kept = slider.value; draw(); slider.value = kept; cursor(); });
}

// data: {x, y, points: [{group, label, x, y, low, high}]}: names of the axes, and points with the interval of their y.
function pointsView(figure, data) {
  const place = element("div"), told = element("output", { "aria-live": "polite" }, "Point at a mark, or read the table below.");
  figure.prepend(place, told);
  const groups = [...new Set(data.points.map((p) => p.group))];
  const starts = new Set(data.points.map((p) => p.label.slice(0, p.label.indexOf("/") + 1)));
  const common = starts.size === 1 ? [...starts][0] : "";  // such as the split, which all names begin with
  function draw() {
    const frame = frameOf(figure, range(data.points.map((p) => p.x)), range(data.points.flatMap((p) => [p.y, p.low, p.high])), data.x, data.y);
    frame.svg.setAttribute("aria-label", `${data.y} against ${data.x}: ${data.points.length} points; the table has their numbers`);
    const seen = [], taken = [];
    for (const p of data.points) {
      const i = groups.indexOf(p.group), style = `s${i % STYLES}`, [x, y] = [frame.x(p.x), frame.y(p.y)];
      if (p.low !== null) frame.svg.append(shape("line", { class: `${style} arm`, x1: x, x2: x, y1: frame.y(p.low), y2: frame.y(p.high) }));
      // One that lies on another is a ring around it.
      const under = seen.filter(([left, top]) => Math.hypot(left - x, top - y) < 4).length;
      seen.push([x, y]);
      const mark = shape("circle", { class: `${style} mark${under || i >= STYLES ? " ring" : ""}`, cx: x, cy: y, r: 5 + 3 * under });
      const words = `${p.group}: ${p.label}: ${data.y} ${format(p.y)}${p.low === null ? "" : ` [${format(p.low)}, ${format(p.high)}]`}, ${data.x} ${format(p.x)}`;
      mark.append(shape("title", {}, words));
      mark.addEventListener("pointerenter", () => { told.textContent = words; });
      frame.svg.append(mark);
      taken.push([x - 7, y - 7, x + 7, y + 7]);
    }
    data.points.forEach((p, i) => { if (!data.points.slice(0, i).some((q) => q.label === p.label && q.x === p.x && q.y === p.y)) name(p.label.replace(common, ""), ...seen[i]); });

    // The name beside the mark, wherever it covers no mark and no other name; none where there is no room.
    function name(words, x, y) {
      const width = 6.3 * words.length;
      const places = [[x + 9, y + 4], [x - 9 - width, y + 4], [x - width / 2, y - 12], [x - width / 2, y + 21]];
      const found = places.map(([left, base]) => [left, base - 11, left + width, base + 3])
        .find((box) => box[0] > frame.left && box[2] < frame.right + 14 && box[1] > frame.top && box[3] < frame.bottom
          && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]));
      if (!found) return;
      taken.push(found);
      frame.svg.append(shape("text", { class: "point", x: found[0], y: found[3] - 3 }, words));
    }
    place.replaceChildren(frame.svg, legend(groups));
  }
  draw();
  onResize(figure, draw);
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
  module.exports = { ticks, tickLabels, stretches, range, smoothed, wordDifference, compareCells, nearest, format };
}
