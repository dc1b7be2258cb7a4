// Draws the page from the JSON in it, and a live one from what the server sends. Texts of runs are set as text only.
"use strict";
(() => {
  const COLOURS = {
    light: ["#0072b2", "#d55e00", "#009e73", "#b0508e", "#8a6d00", "#3a9bd1", "#5c6370"],
    dark: ["#5ab4f0", "#ff8a4c", "#2fd0a0", "#e79ac8", "#e6c229", "#a3dcff", "#c8ccd2"],
  };
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "star"];
  const GLYPHS = ["●", "■", "◆", "▲", "✖", "✚", "★"];
  const DASHES = ["solid", "dash", "dot"];
  const CLEAR_BANDS = 6; // the bands of more curves than that hide each other
  const PAGE_SIZE = 10;
  const MARKED_POINTS = 14;
  const TABLE_POINTS = 50;
  const POLL_MS = 2000;
  const PATIENCE_MS = 30_000;
  const SHORT_CELL = 28;
  const SHORT_ANSWER = 80;
  const SHORT_PROMPT = 400;
  const LONG_TEXT = 500; // letters or, sooner, lines, of which a phone may not show all at once
  const LONG_LINES = 15;
  const INVISIBLE = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu;

  const byId = (id) => document.getElementById(id);
  let data = JSON.parse(byId("data").textContent);
  const state = {
    axis: null, seeds: false, bands: null, hidden: new Set(), variants: {}, // null: what suits the data
    run: null, before: null, after: null, filter: "all", search: "", page: 0, drawnSamples: null, listed: null, config: null,
  };
  const darkScheme = matchMedia("(prefers-color-scheme: dark)");

  // --- elements and numbers ---

  function el(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  /** Text in which characters that cannot be seen, or that turn others round, are shown by their numbers. */
  function visible(text) {
    const parts = document.createDocumentFragment();
    let end = 0;
    for (const match of text.matchAll(INVISIBLE)) {
      parts.append(text.slice(end, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parts.append(el("span", { class: "invisible" }, `U+${code}`));
      end = match.index + match[0].length;
    }
    parts.append(text.slice(end));
    return parts;
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e6) {
      const power = Math.min(6, Math.floor(Math.log10(size) / 3));
      return `${Number((value / 1000 ** power).toPrecision(4))}${["", "k", "M", "G", "T", "P", "E"][power]}`;
    }
    if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en");
    if (size < 1e-3) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  }

  function fill(select, options, chosen) {
    const same = select.options.length === options.length
      && options.every(([value, text], place) => {
        const option = select.options[place];
        return option.value === value && option.textContent === text;
      });
    if (!same) select.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
    select.value = chosen;
  }

  function tableOf(columns, rows, name) {
    const numeric = columns.map((_, place) => place > 0 && rows.some((row) => typeof row[place] === "number")
      && rows.every((row) => typeof row[place] !== "string"));
    const head = el("tr", {}, ...columns.map((column, place) =>
      el("th", { scope: "col", class: numeric[place] ? "number" : "text" }, visible(column))));
    const body = rows.map((row) => el("tr", {}, ...row.map((cell, place) => {
      const shown = typeof cell === "string" ? visible(cell) : number(cell);
      if (place === 0) return el("th", { scope: "row" }, shown);
      const kind = numeric[place] ? "number" : String(cell ?? "").length <= SHORT_CELL ? "short" : "text";
      return el("td", { class: kind }, shown);
    })));
    const table = el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, table);
  }

  /** Puts a table where one was, scrolled and focused as that, or at the end. */
  function putTable(place, made) {
    const old = place.querySelector(".scroll");
    const [left, top, focused] = [old?.scrollLeft ?? 0, old?.scrollTop ?? 0, old !== null && old === document.activeElement];
    if (old) old.replaceWith(made);
    else place.append(made);
    made.scrollTo(left, top);
    if (focused) made.focus({ preventScroll: true });
  }

  function showTable(place, table) {
    const note = place.querySelector(".note") ?? place.appendChild(el("p", { class: "note" }));
    note.replaceChildren(visible(table.text));
    if (table.rows.length) putTable(place, tableOf(table.columns, table.rows, table.heading));
    else place.querySelector(".scroll")?.remove();
  }

  // --- colours ---

  function scheme() {
    return document.documentElement.dataset.theme || (darkScheme.matches ? "dark" : "light");
  }

  const colour = (style, which) => COLOURS[which ?? scheme()][style % COLOURS.light.length];
  const dash = (style) => DASHES[Math.floor(style / COLOURS.light.length) % DASHES.length];

  function faded(hex, alpha) {
    const [red, green, blue] = [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
    return `rgba(${red},${green},${blue},${alpha})`;
  }

  function swatch(style, block) {
    const made = el("span", { class: block ? "swatch block" : `swatch ${dash(style)}`, "aria-hidden": "true" });
    if (!block) made.append(GLYPHS[style % GLYPHS.length]);
    made.style.color = colour(style);
    return made;
  }

  // --- plots ---

  const axis = () => state.axis ?? data.axis;
  const withBands = () => state.bands ?? data.groups.length <= CLEAR_BANDS;
  const labelText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const shortened = (text) => (text.length > 22 ? `${text.slice(0, 12)}…${text.slice(-9)}` : text);
  const variantOf = (plot) => plot.variants.find((each) => each.key === state.variants[plot.name])
    ?? plot.variants.find((each) => each.curves.some((curve) => !hides(curve.style))) ?? plot.variants[0];
  const shownCurves = (plot) => variantOf(plot).curves.filter((curve) => !hides(curve.style));
  const hides = (style) => data.groups[style].keys.some((key) => state.hidden.has(key));
  const shownGroups = () => data.groups.map((_, group) => group).filter((group) => !hides(group));

  function pointsOf(curve) {
    const [x, y, bands] = curve.points[axis()];
    return { x: data.arrays[x], y: data.arrays[y], bands: bands.map((band) => band.map((place) => data.arrays[place])) };
  }

  function curveTraces(plot, curve, which) {
    const tone = colour(curve.style, which);
    const { x, y, bands } = pointsOf(curve);
    const traces = [];
    (withBands() || plot.name === "population" ? bands : []).forEach(([low, high], place) => {
      const there = x.map((_, point) => point).filter((point) => low[point] !== null && high[point] !== null);
      if (!there.length) return;
      const edge = { x: there.map((point) => x[point]), mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      traces.push({ ...edge, y: there.map((point) => low[point]) });
      const fill = { fill: "tonexty", fillcolor: faded(tone, place ? 0.3 : 0.16) };
      traces.push({ ...edge, ...fill, y: there.map((point) => high[point]) });
    });
    if (state.seeds) {
      for (const seed of curve.seeds) {
        const line = pointsOf(seed);
        const look = { line: { color: tone, width: 1, dash: dash(curve.style) }, opacity: 0.55 };
        traces.push({ x: line.x, y: line.y, mode: "lines", name: labelText(seed.label), showlegend: false, ...look });
      }
    }
    traces.push({
      x, y, name: labelText(curve.label), mode: "lines+markers",
      line: { color: tone, width: 2.2, dash: dash(curve.style) },
      marker: {
        symbol: MARKERS[curve.style % MARKERS.length], size: 7,
        maxdisplayed: x.length > MARKED_POINTS ? MARKED_POINTS : 0,
      },
    });
    return traces;
  }

  function barTraces(plot, which) {
    return Object.entries(plot.parts).map(([part, values], place) => ({
      type: "bar", orientation: "h", name: labelText(part),
      y: shownGroups(),
      x: shownGroups().map((group) => values[group]),
      marker: { color: colour(place, which), line: { width: 1, color: which === "light" ? "#fff" : "rgba(0,0,0,0)" } },
      hovertemplate: `%{x:.4s} s<extra>${labelText(part)}</extra>`,
    }));
  }

  function layoutOf(plot, width, ink, rule) {
    const line = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true, exponentformat: "SI" };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", size: 13, color: ink },
      margin: { l: 52, r: 14, t: 10, b: 44 }, height: width < 500 ? 270 : 330, barmode: "stack", bargap: 0.35,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", hoverlabel: { namelength: 40 },
      uirevision: plot.kind === "bars" ? plot.name : `${axis()} ${variantOf(plot).key}`, // what was zoomed to stays so
    };
    if (plot.kind === "bars") {
      const shown = shownGroups();
      layout.height = 90 + 34 * Math.max(2, shown.length);
      layout.xaxis = { ...line, title: { text: plot.unit } };
      const names = shown.map((group) => labelText(shortened(plot.labels[group])));
      layout.yaxis = { ...line, tickvals: shown, ticktext: names, autorange: "reversed", gridcolor: "rgba(0,0,0,0)" };
    } else {
      const variant = variantOf(plot);
      layout.xaxis = { ...line, title: { text: data.axes[axis()] }, nticks: width < 500 ? 5 : 9 };
      layout.yaxis = { ...line, title: { text: labelText(variant.label) }, tickformat: variant.share ? "~%" : "" };
    }
    return layout;
  }

  const tracesOf = (plot, which) =>
    (plot.kind === "bars" ? barTraces(plot, which) : shownCurves(plot).flatMap((curve) => curveTraces(plot, curve, which)));

  function draw(plot) {
    const card = byId(`plot-${plot.name}`);
    const style = getComputedStyle(card);
    const layout = layoutOf(plot, card.clientWidth, style.color, style.borderTopColor);
    const place = card.querySelector(".plot");
    Plotly.react(place, tracesOf(plot, scheme()), layout, { responsive: true, displayModeBar: false });
  }

  /** What goes with a plot: its legend, its numbers, and its place. */
  function describe(plot) {
    const card = byId(`plot-${plot.name}`);
    const place = card.querySelector(".plot");
    place.style.minHeight = `${layoutOf(plot, card.clientWidth).height}px`;
    place.setAttribute("aria-label", inWords(plot));
    card.querySelector(".legend").replaceChildren(...legendOf(plot));
    const numbers = card.querySelector("details");
    if (numbers.open) showNumbers(plot, numbers);
  }

  function legendOf(plot) {
    if (plot.kind === "bars") {
      return Object.keys(plot.parts).map((part, place) => el("li", {}, swatch(place, true), visible(part)));
    }
    return shownCurves(plot).map((curve) => el("li", {}, swatch(curve.style), visible(curve.label)));
  }

  function inWords(plot) {
    if (plot.kind === "bars") {
      const sums = shownGroups().map((group) => {
        const parts = Object.entries(plot.parts).map(([part, values]) => `${part} ${number(values[group])}`);
        return `${plot.labels[group]}: ${parts.join(", ")}.`;
      });
      return `Bar chart of ${plot.title.toLowerCase()}, in seconds. ${sums.join(" ")}`;
    }
    const sentences = shownCurves(plot).map((curve) => {
      const values = pointsOf(curve).y.filter((value) => value !== null);
      const most = values.reduce((one, other) => Math.max(one, other), -Infinity);
      if (!values.length) return `${curve.label}: nothing yet.`;
      return `${curve.label}: ${number(values[0])} first, ${number(values.at(-1))} last, ${number(most)} at most.`;
    });
    return `Line chart of ${variantOf(plot).label.toLowerCase()} over ${data.axes[axis()].toLowerCase()}. ${sentences.join(" ") || "No run is shown."}`;
  }

  function showNumbers(plot, place) {
    putTable(place, plot.kind === "bars" ? barNumbers(plot) : curveNumbers(plot));
  }

  function barNumbers(plot) {
    const rows = shownGroups().map((group) => [plot.labels[group], ...Object.values(plot.parts).map((values) => values[group])]);
    return tableOf(["Run", ...Object.keys(plot.parts).map((part) => `${part} (s)`)], rows, plot.title);
  }

  function curveNumbers(plot) {
    const variant = variantOf(plot);
    const rows = shownCurves(plot).flatMap((curve) => {
      const { x, y, bands } = pointsOf(curve);
      const every = Math.max(1, Math.ceil(x.length / TABLE_POINTS));
      return x.map((value, point) => [curve.label, value, y[point], ...bands.flatMap((band) => band.map((edge) => edge[point]))])
        .filter((_, point) => point % every === 0 || point === x.length - 1);
    });
    const widest = Math.max(3, ...rows.map((row) => row.length));
    const edges = widest > 5 ? ["Lowest", "Highest", "Lower quarter", "Upper quarter"] : ["Low", "High"];
    const padded = rows.map((row) => [...row, ...Array(widest - row.length).fill(null)]);
    return tableOf(["Curve", data.axes[axis()], variant.label, ...edges.slice(0, widest - 3)], padded, plot.title);
  }

  async function download(plot) {
    const layout = { ...layoutOf(plot, 1000, "#1a1d21", "#d9dde2"), paper_bgcolor: "#fff", height: 600, width: 1000 };
    layout.showlegend = true;
    layout.legend = { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 };
    layout.margin = { l: 60, r: 20, t: 50, b: 55 };
    const url = await Plotly.toImage({ data: tracesOf(plot, "light"), layout }, { format: "png", scale: 2, height: 600, width: 1000 });
    const name = plot.kind === "bars" ? plot.name : `${plot.name}-${variantOf(plot).name}`.replace(/[^\w-]+/g, "_");
    el("a", { href: url, download: `${name}.png` }).click();
  }

  const current = (name) => data.plots.find((plot) => plot.name === name);

  function makeCard(plot) {
    const select = el("select");
    const figure = el("label", {}, "Figure ", select);
    const save = el("button", { type: "button", "aria-label": `Save ${plot.title} as PNG` }, "PNG");
    const numbers = el("details", {}, el("summary", {}, "Numbers"));
    const name = plot.name;
    select.addEventListener("change", () => { state.variants[name] = select.value; describe(current(name)); draw(current(name)); });
    save.addEventListener("click", () => download(current(name)));
    numbers.addEventListener("toggle", () => { if (numbers.open) showNumbers(current(name), numbers); });
    const heading = el("h3", { id: `plot-${name}-title` }, plot.title);
    return el("figure", { class: `card ${name === "held-out" ? "wide" : ""}`, id: `plot-${name}`, "aria-labelledby": heading.id },
      el("div", { class: "head" }, heading, el("div", { class: "tools" }, figure, save)),
      el("p", { class: "caption" }, plot.caption),
      el("ul", { class: "legend", "aria-hidden": "true" }),
      el("div", { class: "plot", role: "img" }),
      numbers);
  }

  function showPlots() {
    const names = new Set(data.plots.map((plot) => `plot-${plot.name}`));
    for (const card of [...byId("plots").children]) if (!names.has(card.id)) card.remove();
    data.plots.forEach((plot, place) => {
      const card = byId(`plot-${plot.name}`) ?? makeCard(plot);
      if (byId("plots").children[place] !== card) byId("plots").insertBefore(card, byId("plots").children[place] ?? null);
      const variants = plot.variants ?? [];
      const select = card.querySelector("select");
      select.parentElement.hidden = variants.length < 2;
      fill(select, variants.map((each) => [each.key, each.name]), variants.length ? variantOf(plot).key : "");
    });
    drawAll();
  }

  const stale = new Set();
  let waiting = false;

  /** Draws plot after plot, with a breath between them, so that the page answers meanwhile. */
  function drawAll() {
    data.plots.forEach(describe);
    stale.clear();
    for (const plot of data.plots) stale.add(plot.name);
    delete document.body.dataset.drawn;
    if (!waiting) drawNext();
  }

  function drawNext() {
    const plot = data.plots.find((each) => stale.delete(each.name));
    if (plot) draw(plot);
    waiting = stale.size > 0;
    if (waiting) setTimeout(drawNext);
    else document.body.dataset.drawn = "";
  }

  function showControls() {
    fill(byId("axis"), Object.entries(data.axes), axis());
    byId("bands").checked = withBands();
    byId("seeds-label").hidden = data.groups.every((group) => group.runs.length < 2);
    const place = byId("shown");
    place.hidden = data.groups.length < 2;
    const labels = [...place.querySelectorAll("label")];
    const same = labels.length === data.groups.length
      && labels.every((label, style) => label.dataset.keys === keysOf(style) && label.dataset.label === data.groups[style].label);
    if (same) {
      labels.forEach((label, style) => label.querySelector(".swatch").replaceWith(swatch(style)));
      return;
    }
    const focused = labels.find((label) => label.contains(document.activeElement))?.dataset.keys.split(" ");
    place.replaceChildren(el("legend", {}, "Shown"), ...data.groups.map(shownControl));
    if (focused) {
      [...place.querySelectorAll("label")].find((label) => label.dataset.keys.includes(focused[0]))
        ?.control.focus({ preventScroll: true });
    }
  }

  const keysOf = (style) => data.groups[style].keys.join(" ");

  /** A box that hides a group's runs, so that it hides others that join them. */
  function shownControl(group, style) {
    const box = el("input", { type: "checkbox" });
    box.checked = !hides(style);
    box.addEventListener("change", () => {
      for (const key of group.keys) state.hidden[box.checked ? "delete" : "add"](key);
      showPlots();
    });
    return el("label", { "data-keys": keysOf(style), "data-label": group.label }, box, swatch(style), visible(group.label));
  }

  // --- samples ---

  const sampleRun = () => data.samples.runs.find((run) => run.key === state.run);

  function showSampleControls() {
    const runs = data.samples.runs.filter((run) => Object.keys(run.steps).length);
    const some = runs.length > 0;
    byId("sample-controls").hidden = !some;
    if (!runs.some((run) => run.key === state.run)) state.run = some ? runs[0].key : null;
    fill(byId("sample-run"), runs.map((run) => [run.key, run.name]), state.run);
    if (!some) return;
    const steps = Object.keys(sampleRun().steps);
    const options = steps.map((step) => [step, step]);
    fill(byId("sample-before"), options, nearest(steps, state.before) ?? steps[0]);
    fill(byId("sample-after"), options, nearest(steps, state.after) ?? steps.at(-1));
  }

  /** The step next to the wanted one, which another run, or a page with less room, may lack; null where none is. */
  function nearest(steps, wanted) {
    if (wanted === null) return null;
    return steps.reduce((one, other) => (Math.abs(other - wanted) < Math.abs(one - wanted) ? other : one));
  }

  /** The problems of the chosen run, each with its completion at both evaluations. */
  function pairs() {
    const run = sampleRun();
    if (!run) return [];
    const [before, after] = ["sample-before", "sample-after"].map((id) => run.steps[byId(id).value] ?? []);
    const earlier = new Map(before.map((row) => [row.key, row]));
    return after.map((row) => {
      const old = earlier.get(row.key);
      const change = old && old.reward !== null && row.reward !== null ? row.reward - old.reward : 0;
      return { key: data.samples.texts[row.key], before: old, after: row, change };
    });
  }

  function listed() {
    const lowest = (pair) => pair.after.reward ?? -Infinity;
    const order = (one, other) => (one < other ? -1 : one > other ? 1 : 0);
    const found = pairs().filter(({ key, before, after }) => {
      if (!state.search) return true;
      const texts = [key, data.samples.texts[after.prompt], data.samples.texts[after.answer], after.completion, after.notes];
      if (before) texts.push(before.completion, before.notes);
      return texts.some((text) => text.toLowerCase().includes(state.search));
    });
    switch (state.filter) {
      case "best": return found.sort((one, other) => order(lowest(other), lowest(one)));
      case "worst": return found.sort((one, other) => order(lowest(one), lowest(other)));
      case "rose": return found.filter((pair) => pair.change > 0).sort((one, other) => other.change - one.change);
      case "fell": return found.filter((pair) => pair.change < 0).sort((one, other) => one.change - other.change);
      default: return found;
    }
  }

  function textBlock(text) {
    const long = text.length > LONG_TEXT || text.split("\n").length > LONG_LINES;
    return el("pre", { dir: "auto", ...(long ? { tabindex: "0" } : {}) }, text ? visible(text) : el("span", { class: "invisible" }, "empty"));
  }

  /** A text under its name, or beside it where it is short. */
  function labelled(name, text) {
    const short = text.length <= SHORT_ANSWER && !text.includes("\n");
    if (short) return [el("p", { class: "label" }, `${name} `, el("code", { dir: "auto" }, visible(text)))];
    return [el("p", { class: "label" }, name), textBlock(text)];
  }

  function sideOf(name, step, row) {
    const side = el("div", {}, el("h4", {}, `${name} (step ${step})`));
    if (!row) {
      side.append(el("p", { class: "note" }, "There is no completion of this problem."));
      return side;
    }
    const scores = [["reward", row.reward], ["accuracy", row.accuracy], ...Object.entries(row.components), ["tokens", row.tokens]];
    side.append(el("dl", { class: "scores" }, ...scores.map(([part, value]) =>
      el("div", {}, el("dt", {}, visible(part)), el("dd", {}, number(value))))), textBlock(row.completion));
    if (row.notes) side.append(...labelled("Notes of the verifier", row.notes));
    return side;
  }

  function changeOf({ before, after, change }) {
    const kind = change > 0 ? "rose" : change < 0 ? "fell" : "same";
    const sign = { rose: "▲ rose", fell: "▼ fell", same: "unchanged" }[kind];
    if (!before || before.reward === null || after.reward === null) return el("span", { class: "change" }, `reward ${number(after.reward)}`);
    return el("span", { class: `change ${kind}` }, `reward ${number(before.reward)} → ${number(after.reward)} ${sign}`);
  }

  function article(pair) {
    const prompt = data.samples.texts[pair.after.prompt];
    const answer = data.samples.texts[pair.after.answer];
    const details = el("details", {}, el("summary", {}, "Prompt"), textBlock(prompt));
    details.open = prompt.length <= SHORT_PROMPT;
    const made = el("article", { class: "sample", "aria-label": `Problem ${pair.key}` },
      el("div", { class: "head" }, el("h3", {}, visible(pair.key)), changeOf(pair)), details);
    if (answer) made.append(...labelled("Expected answer", answer));
    const [before, after] = ["sample-before", "sample-after"].map((id) => byId(id).value);
    made.append(el("div", { class: "sides" },
      ...(before === after ? [] : [sideOf("Before", before, pair.before)]),
      sideOf(before === after ? "Completion" : "After", after, pair.after)));
    return made;
  }

  /** The list itself only where it has changed: somebody may be reading in it. */
  function showSamples() {
    const found = listed();
    const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
    state.page = Math.min(state.page, pages - 1);
    const start = state.page * PAGE_SIZE;
    const end = Math.min(found.length, start + PAGE_SIZE);
    const run = sampleRun();
    byId("sample-note").textContent = run ? leftOut(run) : "There are none yet.";
    byId("sample-count").textContent = found.length ? `${start + 1} to ${end} of ${found.length}` : "none";
    byId("sample-previous").disabled = state.page === 0;
    byId("sample-next").disabled = state.page >= pages - 1;
    const list = found.slice(start, end);
    const sides = ["sample-before", "sample-after"].map((id) => byId(id).value);
    const text = JSON.stringify([sides, list.map(({ before, after }) => [spelled(before), spelled(after)])]);
    if (state.listed === text) return;
    state.listed = text;
    byId("sample-list").replaceChildren(...list.map(article));
  }

  /** A completion with its texts in place of where they are. */
  function spelled(row) {
    const { texts } = data.samples;
    return row && { ...row, key: texts[row.key], prompt: texts[row.prompt], answer: texts[row.answer] };
  }

  function leftOut(run) {
    const evaluations = Object.keys(run.steps).length;
    const rows = Math.max(...Object.values(run.steps).map((each) => each.length));
    const of = (kept, all, what) => (kept === all ? `all ${all} ${what}` : `${kept} of ${all} ${what}, evenly spaced`);
    return `In this file: ${of(rows, run.rows, "completions")} of ${of(evaluations, run.evaluations, "evaluations")}. `
      + "What is left out is in the run folder, under samples/.";
  }

  function relist() {
    state.page = 0;
    showSamples();
  }

  // --- configs, everything, live ---

  function showConfig() {
    const chosen = data.configs.find((config) => config.key === state.config) ?? data.configs[0];
    state.config = chosen?.key ?? null;
    fill(byId("config-run"), data.configs.map((config) => [config.key, config.name]), state.config);
    const text = chosen?.text ?? "";
    if (byId("config").dataset.text !== text) {
      byId("config").dataset.text = text;
      byId("config").replaceChildren(visible(text));
    }
  }

  function showTables(place, tables) {
    const headings = tables.map((table) => table.heading);
    const same = place.children.length === headings.length
      && [...place.children].every((section, number_) => section.dataset.heading === headings[number_]);
    if (!same) {
      place.replaceChildren(...headings.map((heading, number_) => el("section",
        { "data-heading": heading, "aria-labelledby": `${place.id}-${number_}` },
        el("h2", { id: `${place.id}-${number_}` }, visible(heading)), el("div"))));
    }
    tables.forEach((table, number_) => showTable(place.children[number_].lastElementChild, table));
  }

  /** Only where they have changed, since they are read aloud. */
  function showProblems() {
    const place = byId("problems");
    const text = data.problems.join("\n");
    if (place.dataset.text === text) return;
    place.dataset.text = text;
    place.replaceChildren(...data.problems.map((problem) => el("p", {}, visible(problem))));
  }

  function show() {
    byId("subtitle").textContent = data.subtitle;
    showProblems();
    showTable(byId("summary"), data.summary);
    showTables(byId("tables"), data.tables);
    showControls();
    showPlots();
    showTables(byId("details"), data.details);
    if (state.drawnSamples !== data.samples_version) {
      state.drawnSamples = data.samples_version;
      showSampleControls();
      showSamples();
    }
    showTable(byId("failures"), data.failures);
    showTable(byId("differences"), data.differences);
    showConfig();
  }

  let etag = null;
  async function poll() {
    try {
      if (!document.hidden) await ask();
    } finally {
      setTimeout(poll, POLL_MS);
    }
  }

  async function ask() {
    let lost = false;
    try {
      const answer = await fetch("data.json", {
        headers: etag ? { "If-None-Match": etag } : {}, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS),
      });
      if (answer.ok) {
        data = await answer.json(); // SyntaxError where another server answers
        etag = answer.headers.get("ETag");
        show();
      } else {
        lost = answer.status !== 304;
      }
    } catch (error) {
      const unanswered = error instanceof TypeError || error.name === "TimeoutError"; // of the wrong kind: SyntaxError
      if (!unanswered && !(error instanceof SyntaxError)) throw error;
      lost = true;
    }
    const text = lost ? "The live view has lost its server, and goes on asking." : "Live: the page follows the runs.";
    if (byId("live").textContent !== text) byId("live").textContent = text;
    byId("live").classList.toggle("lost", lost);
  }

  function onChange(id, event, act) {
    byId(id).addEventListener(event, () => act(byId(id)));
  }

  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  onChange("axis", "change", (select) => { state.axis = select.value; drawAll(); });
  onChange("bands", "change", (box) => { state.bands = box.checked; drawAll(); });
  onChange("seeds", "change", (box) => { state.seeds = box.checked; drawAll(); });
  onChange("theme", "change", (select) => { document.documentElement.dataset.theme = select.value; showControls(); drawAll(); });
  onChange("sample-run", "change", (select) => { state.run = select.value; showSampleControls(); relist(); });
  onChange("sample-before", "change", (select) => { state.before = select.value; relist(); });
  onChange("sample-after", "change", (select) => { state.after = select.value; relist(); });
  onChange("sample-filter", "change", (select) => { state.filter = select.value; relist(); });
  onChange("sample-search", "input", (input) => { state.search = input.value.toLowerCase(); relist(); });
  onChange("config-run", "change", (select) => { state.config = select.value; showConfig(); });
  for (const [id, by] of [["sample-previous", -1], ["sample-next", 1]]) {
    byId(id).addEventListener("click", () => {
      state.page += by;
      showSamples();
      byId("samples-title").scrollIntoView();
    });
  }
  darkScheme.addEventListener("change", () => { showControls(); drawAll(); });

  show();
  if ("live" in document.body.dataset) {
    byId("live").hidden = false;
    poll();
  }
})();
