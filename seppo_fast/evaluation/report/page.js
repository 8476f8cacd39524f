"use strict";
// Everything is drawn from the result. Its texts become text nodes and attributes, never markup: a prompt may be anything.

const result = JSON.parse(document.getElementById("result").textContent);
const {about, models, scores, groups} = result;
const [first, ...others] = models.map(model => model.name);
const sampleScores = scores.filter(score => score.kind === "sample" && !score.missing);
const scoreOf = new Map(scores.map(score => [score.name, score]));
const sign = score => score.better === "lower" ? -1 : 1;
const key = (...parts) => parts.join("\n");
const cells = new Map(result.table.map(row => [key(row.model, row.group, row.score), row]));
const PAGE = 50;
const nothingScored = scores.every(score => score.missing);
const given = scores.filter(score => !score.missing).flatMap(score => Object.entries(score.weights ?? {})
  .filter(([part, place]) => place !== score.published?.[part]).map(([part, place]) => ({score, part, place})));

// A row is a prompt and a sample's index, with the samples of all models: the same noise for each.
const prompts = new Map(result.prompts.map(prompt => [prompt.index, {...prompt, words: folded(prompt.text)}]));
const rows = new Map();
for (const sample of result.samples) {
  const id = `pictures-${sample.prompt}-${sample.sample}`;
  if (!rows.has(id)) rows.set(id, {id, prompt: prompts.get(sample.prompt), sample: sample.sample, of: new Map()});
  rows.get(id).of.set(sample.model, sample);
}
const inOrder = [...rows.values()].sort((a, b) => a.prompt.index - b.prompt.index || a.sample - b.sample);
const several = inOrder.some(row => row.sample !== inOrder[0].sample);

// What is chosen; in the address too, so that a view can be sent.
const defaults = {group: groups[0], q: "", score: sampleScores[0]?.name ?? "", model: others[0] ?? first, sort: "prompt"};
const choices = {group: groups, score: sampleScores.map(score => score.name), model: others.length ? others : [first],
                 sort: ["prompt", "gain", "loss"]};
let state = fromAddress();

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const valid = name => given.has(name) && (choices[name]?.includes(given.get(name)) ?? true);
  return Object.fromEntries(Object.entries(defaults).map(([name, usual]) => [name, valid(name) ? given.get(name) : usual]));
}

function change(part) {
  const figures = "group" in part;
  state = {...state, ...part};
  const said = new URLSearchParams(Object.entries(state).filter(([name, value]) => value !== defaults[name])).toString();
  history.replaceState(null, "", `#${said}`);
  draw(figures);
}

function draw(figures = true) {
  for (const name of Object.keys(state)) document.getElementById(name).value = state[name];
  if (figures) [drawTable, drawVerdicts, drawWins, drawHistograms].forEach(part => part());
  drawSamples();
}

// Small tools.
function h(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "rect", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child || child === 0));
  return node;
}

function fill(id, ...children) {
  document.getElementById(id).replaceChildren(...children.flat(Infinity).filter(child => child || child === 0));
}

function folded(text) { return text.normalize("NFKC").toLowerCase(); }
function known(value) { return typeof value === "number"; }
function member(prompt, group) { return group === groups[0] || prompt.group === group || !!prompt.group?.startsWith(`${group}/`); }
function cell(model, score, group = state.group) { return cells.get(key(model, group, score.name)); }
function valueOf(row, model, score) { const value = row.of.get(model)?.values[score.name]; return known(value) ? value : null; }
function colour(model) { const place = others.indexOf(model); return `--model: var(--model-${place < 0 ? 0 : place % 5 + 1})`; }
function swatch(model) { return h("span", {class: "swatch", style: colour(model), "aria-hidden": "true"}); }
function hidden(text) { return h("span", {class: "hidden"}, text); }
function arrow(score) {
  return [" ", h("span", {"aria-hidden": "true"}, score.better === "lower" ? "↓" : "↑"), hidden(`(${score.better} is better)`)];
}
function plural(count, word) { return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`; }
function minus(text) { return text.replace("-", "−"); }
function number(value) { return known(value) ? minus(value.toFixed(Math.abs(value) >= 10 ? 2 : 3)) : "no value"; }
function ascending(one, other) { return one - other; }
function percent(value) { return `${(100 * value).toFixed(1)}\u00a0%`; }
function between(row) { return `${number(row.low)} to ${number(row.high)}`; }
function shares(won) { return `${(100 * won.low).toFixed(1)} to ${(100 * won.high).toFixed(1)}`; }
function judged(won) { return !known(won?.mean) ? null : won.low > 0.5 ? "better" : won.high < 0.5 ? "worse" : "open"; }

// What was compared.
function drawAbout() {
  const {seed, per_prompt, ...sampler} = about.settings ?? {};
  const flat = things => Object.entries(things ?? {}).filter(([, value]) => value != null)
    .map(([name, value]) => h("span", {class: "fact"}, `${name.replaceAll("_", " ")} `, h("b", {}, String(value))));
  const sizes = groups.slice(1).map(group => `${group} ${result.prompts.filter(prompt => member(prompt, group)).length}`);
  const facts = {
    Models: models.map(model => h("div", {}, swatch(model.name), h("b", {}, model.name), " ", h("code", {}, model.path),
      model.improves && h("span", {class: "note"}, ` (improves the samples of ${model.improves})`),
      model.local && h("span", {class: "note"}, " (local files)"))),
    Prompts: [plural(result.prompts.length, "prompt"), sizes.length && ` (${sizes.join(", ")})`,
              per_prompt && `, ${plural(per_prompt, "sample")} a prompt`],
    Sampler: flat(sampler), Seed: [known(seed) && String(seed)], Date: [about.date],
    Commit: [about.commit && h("code", {}, about.commit)], Versions: flat(about.versions), Machine: flat(about.machine),
    Time: flat(Object.fromEntries(Object.entries(about.seconds ?? {}).map(([name, value]) => [name, `${value} s`]))),
  };
  fill("about", Object.entries(facts).filter(([, value]) => value.some(Boolean))
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value.filter(Boolean)))));
}

// The table: models down, scores across.
function drawTable() {
  const heads = scores.map(score => h("th", {scope: "col"}, score.label, arrow(score)));
  const body = models.map(({name}) => h("tr", {}, h("th", {scope: "row"}, swatch(name), name),
    scores.map(score => score.missing ? h("td", {class: "none", "aria-describedby": `missing-${score.name}`}, "missing")
                                      : figures(name, score))));
  const legend = `Prompts: ${state.group}. Mean; below it its 95\u00a0% interval` + (!others.length ? "." :
    `, then the win rate: the share of samples${scores.some(score => score.kind === "prompt") ? ", or of prompts," : ""}` +
    ` that are better than ${first}’s from the same noise.` +
    " Better and worse: the whole interval of the win rate is above or below 50\u00a0%." +
    " Bold: the 95\u00a0% interval of the difference to every other model is clear of zero.");
  fill("scores-note", legend);
  fill("table", h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "Model"), heads)), h("tbody", {}, body));
  fill("given", given.length > 0 && [h("p", {}, "Weights given by path, not compared with the published ones:"),
    h("ul", {}, given.map(({score, part, place}) => h("li", {}, `${score.label}, ${part}: `, h("code", {}, place),
      score.published?.[part] && [" (published: ", h("code", {}, score.published[part]), ")"])))]);
  fill("missing", scores.filter(score => score.missing).map(score => h("li", {id: `missing-${score.name}`},
    h("b", {}, `${score.label} is missing: `), score.missing)));
}

function figures(model, score) {
  const row = cell(model, score);
  if (!known(row?.mean)) return h("td", {class: "none"}, "no value");
  const most = Math.max(...models.map(each => cell(each.name, score)?.count ?? 0));
  return h("td", {}, h(row.best ? "strong" : "span", {}, number(row.mean)),
    known(row.low) && h("small", {}, between(row)),
    judged(row.win_rate) && h("small", {class: judged(row.win_rate)}, `${percent(row.win_rate.mean)} (${shares(row.win_rate)})`),
    row.count < most && h("small", {}, `${row.count} of ${most} ${score.kind === "prompt" ? "prompts" : "samples"}`));
}

function drawVerdicts() {
  const words = {better: `better than ${first} on`, worse: `worse than ${first} on`, open: "no clear difference on"};
  fill("verdicts", others.map(model => {
    const labels = (kind, group) => sampleScores.filter(score => judged(cell(model, score, group)?.win_rate) === kind)
      .map(({label}) => label).join(", ");
    const part = (kind, text, rest) => rest && h("span", {}, h("span", {class: kind}, text), ` ${rest}`);
    const parts = Object.entries(words).map(([kind, text]) => part(kind, text, labels(kind, state.group)));
    const within = state.group === groups[0] ? groups.slice(1).filter(group => labels("worse", group)) : [];
    parts.push(part("worse", "worse within", within.map(group => `${group} (${labels("worse", group)})`).join(", ")));
    const said = parts.filter(Boolean).flatMap((each, place) => place ? ["; ", each] : [each]);
    return h("li", {}, swatch(model), h("b", {}, model), ": ", said.length ? said : "no value to compare", ".");
  }));
}

// Win rates as bars.
function drawWins() {
  fill("wins-note", others.length ? `Share of samples that are better than ${first}’s from the same noise, a tie counting half,` +
    " with the 95\u00a0% interval over prompts." : "There is one model, and nothing to compare it with.");
  fill("bars", others.length ? scores.filter(score => score.kind === "sample").map(score => h("article", {},
    h("h3", {}, score.label, arrow(score)), score.missing ? h("p", {class: "none"}, "missing") : [
      h("ul", {class: "wins"}, others.map(model => bar(model, score))),
      h("div", {class: "wins axis", "aria-hidden": "true"}, h("div", {class: "track"},
        h("span", {}, "0"), h("span", {}, "50\u00a0%"), h("span", {}, "100\u00a0%")))])) : []);
}

function bar(model, score) {
  const won = cell(model, score)?.win_rate;
  if (!known(won?.mean)) return h("li", {}, h("span", {class: "name"}, model), h("span", {class: "none"}, "no value"));
  const at = share => `${(100 * share).toFixed(2)}%`;
  const tick = share => h("line", {class: "interval", x1: at(share), x2: at(share), y1: 5, y2: 13});
  const look = sort => () => { change({model, score: score.name, sort}); go("samples"); };
  const see = (sort, text) => h("button", {type: "button", click: look(sort),
                                          "aria-label": `${text}: samples of ${model} by largest ${sort} in ${score.label}`}, text);
  return h("li", {style: colour(model)}, h("span", {class: "name"}, model),
    h("svg", {class: "track", height: 18, "aria-hidden": "true"}, h("rect", {class: "fill", width: at(won.mean), y: 2, height: 14}),
      h("line", {class: "half", x1: "50%", x2: "50%", y1: 0, y2: 18}),
      h("line", {class: "interval", x1: at(won.low), x2: at(won.high), y1: 9, y2: 9}), tick(won.low), tick(won.high)),
    h("span", {class: `value ${judged(won)}`}, percent(won.mean), h("small", {}, ` (${shares(won)})`)),
    h("span", {class: "see"}, see("gain", "gains"), see("loss", "losses")));
}

// Distributions: the same bins and heights for all models of a score.
function drawHistograms() {
  fill("distributions-note", "How the values of single samples spread; height is the share of the samples, a dashed line the mean",
    others.length ? `, the thin outline ${first}.` : ".");
  const shown = inOrder.filter(row => member(row.prompt, state.group));
  fill("histograms", scores.filter(score => score.kind === "sample").map(score => h("figure", {class: "histogram"},
    h("figcaption", {}, score.label, arrow(score)),
    score.missing ? h("p", {class: "none"}, `missing: ${score.missing}`) : histogram(score, shown))));
}

function histogram(score, shown) {
  const valuesOf = name => shown.map(row => valueOf(row, name, score)).filter(known).sort(ascending);
  const series = models.map(({name}) => ({name, values: valuesOf(name)}));
  const all = series.flatMap(({values}) => values).sort(ascending), low = all[0], high = all.at(-1);
  if (!all.length) return h("p", {class: "none"}, "no value");
  const wanted = Math.min(30, Math.max(8, 1.5 * Math.sqrt(all.length / models.length)));
  const step = nice((high - low || Math.abs(low) || 1) / wanted), start = Math.floor(low / step);
  const axis = {step, start, count: Math.floor(high / step) - start + 1};
  for (const each of series) {
    each.bins = new Array(axis.count).fill(0);
    for (const value of each.values) each.bins[Math.floor(value / step) - start] += 1 / each.values.length;
  }
  const top = Math.max(...series.flatMap(({bins}) => bins));
  return [series.map(each => plot(each, series[0], axis, top)), ticks(axis)];
}

function nice(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return power * [1, 2, 5, 10].find(each => each >= step / power * (1 - 1e-9));
}

function plot({name, values, bins}, reference, {step, start, count}, top) {
  if (!values.length) return h("div", {class: "name"}, swatch(name), name, h("span", {class: "none"}, " no value"));
  const level = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01].find(share => share <= top), at = 1 - level / top;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length, x = mean / step - start;
  const outline = shares => `M0,1${shares.map((share, place) => `V${(1 - share / top).toFixed(4)}H${place + 1}`).join("")}V1`;
  const said = `${plural(values.length, "value")} from ${number(values[0])} to ${number(values.at(-1))}`;
  return [
    h("div", {class: "name"}, swatch(name), name,
      h("span", {class: "note"}, ` mean ${number(mean)}, ${plural(values.length, "sample")}`)),
    h("div", {class: "plot"},
      h("span", {class: "level", style: `top: ${100 * at}%`, "aria-hidden": "true"}, `${100 * level}\u00a0%`),
      h("svg", {viewBox: `0 0 ${count} 1`, preserveAspectRatio: "none", role: "img", style: colour(name),
                "aria-label": `${name}: ${said}, mean ${number(mean)}`},
        h("line", {class: "grid", x1: 0, x2: count, y1: at, y2: at}),
        h("path", {class: "fill", d: outline(bins)}),
        name !== first && reference.values.length > 0 && h("path", {class: "first", d: outline(reference.bins)}),
        h("line", {class: "mean", x1: x, x2: x, y1: 0, y2: 1})))];
}

function ticks({step, start, count}) {
  const wide = nice(count * step / 5), digits = Math.max(0, -Math.floor(Math.log10(wide) + 1e-9)), lines = [];
  for (let tick = Math.ceil(start * step / wide); tick * wide <= (start + count) * step; tick++) {
    const x = `${100 * (tick * wide / step - start) / count}%`;
    lines.push(h("line", {x1: x, x2: x, y1: 0, y2: 5}), h("text", {x, y: 17}, minus((tick * wide).toFixed(digits))));
  }
  return h("svg", {class: "ticks", "aria-hidden": "true"}, h("line", {x1: 0, x2: "100%", y1: 0.5, y2: 0.5}), lines);
}

// Samples side by side.
let found = [], shownRows = 0;

function gain(row) {
  const score = scoreOf.get(state.score);
  if (!score) return null;
  const value = valueOf(row, state.model, score), other = others.length ? valueOf(row, first, score) : 0;
  return value === null || other === null ? null : sign(score) * (value - other);
}

function drawSamples() {
  if (document.readyState === "loading") return;
  const words = folded(state.q).split(/\s+/).filter(Boolean);
  const inside = inOrder.filter(row => member(row.prompt, state.group));
  const ranked = inside.filter(row => words.every(word => row.prompt.words.includes(word))).map(row => ({row, gain: gain(row)}));
  const way = {prompt: 0, gain: -1, loss: 1}[state.sort];
  const none = ({gain}) => gain === null;  // last, in both orders
  if (way) ranked.sort((a, b) => none(a) || none(b) ? none(a) - none(b) : way * (a.gain - b.gain));
  found = ranked.map(({row}) => row);
  fill("count", counted(ranked, inside));
  fill("rows");
  shownRows = 0;
  showMore();
}

function counted(ranked, inside) {
  const different = some => new Set(some.map(({prompt}) => prompt.index)).size;
  const text = [`${different(found).toLocaleString("en")} of ${plural(different(inside), "prompt")}`,
                several && `${plural(found.length, "row")}`].filter(Boolean).join(", ");
  if (!others.length || !state.score || !found.length) return `${text}.`;
  const count = test => ranked.filter(({gain}) => test(gain)).length, none = count(gain => gain === null);
  return `${text}. ${scoreOf.get(state.score).label}: ${state.model} is better in ${count(gain => gain !== null && gain > 0)},` +
    ` worse in ${count(gain => gain !== null && gain < 0)}${none ? `, no value to compare in ${none}` : ""}.`;
}

function showMore() {
  const next = found.slice(shownRows, shownRows + PAGE);
  document.getElementById("rows").append(...next.map(drawRow));
  shownRows += next.length;
  const more = document.getElementById("more"), left = found.length - shownRows;
  more.hidden = !left;
  more.textContent = `Show more (${plural(left, "row")} left)`;
}

function drawRow(row) {
  const pictures = JSON.parse(document.getElementById(row.id).textContent);
  const facts = [`prompt ${row.prompt.index}`, several && `sample ${row.sample}`, row.prompt.group].filter(Boolean).join(" · ");
  return h("li", {class: "row"}, h("div", {class: "prompt"}, prompted(row.prompt.text), h("p", {class: "note"}, facts)),
    h("div", {class: "models", style: `--models: ${models.length}`}, models.map(({name}) => figure(row, name, pictures[name]))));
}

function prompted(text) {
  const long = text.length > 300, heading = h("h3", {dir: "auto"}, long ? `${text.slice(0, 240)}…` : text);
  const all = long && h("button", {type: "button", "aria-expanded": "false", click: () => {
    const open = all.getAttribute("aria-expanded") !== "true";
    all.setAttribute("aria-expanded", open);
    all.textContent = open ? "Show less" : "Show all of it";
    heading.textContent = open ? text : `${text.slice(0, 240)}…`;
  }}, "Show all of it");
  return all ? [heading, all] : heading;
}

function figure(row, model, picture) {
  const sample = row.of.get(model), improves = models.find(({name}) => name === model).improves;
  const names = h("figcaption", {}, swatch(model), h("b", {}, model), improves && h("span", {class: "note"}, ` improves ${improves}`));
  if (!sample) return h("figure", {}, names, h("p", {class: "placeholder"}, "no such sample"));
  const {problem} = sample, lost = lostOf(sample), address = sample.file?.split("/").map(encodeURIComponent).join("/");
  const alt = `${model}, sample ${row.sample}: ${row.prompt.text.slice(0, 120)}`;
  return h("figure", {}, h("div", {class: "figure"}, names,
    picture ? h("a", {href: address, target: "_blank", rel: "noopener", class: picture[1] < 64 && "tiny"},
                h("img", {src: picture[0], width: picture[1], height: picture[2], alt, loading: "lazy", decoding: "async"}))
            : h("p", {class: "placeholder"}, lost ?? problem ?? "no picture"),
    problem && (picture || lost) && h("p", {class: "problem"}, problem),
    h("dl", {class: "values"}, sampleScores.map(score => values(row, model, score)))));
}

function values(row, model, score) {
  const value = valueOf(row, model, score), other = valueOf(row, first, score), chosen = score.name === state.score;
  const difference = model !== first && value !== null && other !== null && (value - other);
  const text = known(difference) && difference.toFixed(Math.max(Math.abs(value), Math.abs(other)) >= 10 ? 2 : 3);
  const kind = known(difference) && Number(text) !== 0 ? (sign(score) * difference > 0 ? "better" : "worse") : "open";
  return h("div", {class: chosen && "chosen"}, h("dt", {}, score.label, arrow(score)),
    h("dd", {class: value === null && "none"}, number(value)),
    h("dd", {class: `difference ${kind}`}, text && minus(Number(text) > 0 ? `+${text}` : text),
      kind !== "open" && hidden(` (${kind})`)));
}

let unreadable = {};
// A problem that names the file says already why it cannot be read.
function lostOf(sample) { return sample.problem?.includes(sample.file) ? null : unreadable[sample.file]; }
function why(sample) { return [sample.problem, lostOf(sample)].filter(Boolean).join("; "); }

function drawProblems() {
  const bad = inOrder.flatMap(row => models.map(({name}) => row.of.get(name)).filter(sample => sample && why(sample)));
  const box = document.getElementById("problems");
  box.hidden = !bad.length;
  box.querySelector("summary").textContent = `${plural(bad.length, "sample")} with a problem`;
  const item = sample => h("li", {}, h("b", {}, sample.model),
    `, prompt ${sample.prompt}, sample ${sample.sample}: ${why(sample)} `,
    h("span", {class: "note", dir: "auto"}, prompts.get(sample.prompt).text.slice(0, 120)));
  box.addEventListener("toggle", () => box.querySelector("ul").replaceChildren(...bad.map(item)), {once: true});
}

// Controls.
function go(id) {
  const heading = document.getElementById(id);
  heading.scrollIntoView();
  heading.focus({preventScroll: true});
}

function later(milliseconds, act) {
  let timer;
  return (...given) => { clearTimeout(timer); timer = setTimeout(act, milliseconds, ...given); };
}

const option = (value, text = value, off = false) => h("option", {value, disabled: off}, text);
fill("group", groups.map(group => option(group)));
fill("model", choices.model.map(model => option(model)));
fill("score", scores.filter(score => score.kind === "sample").map(
  score => option(score.name, score.missing ? `${score.label} (missing)` : score.label, !!score.missing)));
fill("sort", option("prompt", "prompt order"), option("gain", others.length ? "largest gain first" : "best first"),
     option("loss", others.length ? "largest loss first" : "worst first"));
document.getElementById("groups").hidden = groups.length < 2;
if (nothingScored) {  // the pictures are all that there is to see
  const part = id => document.getElementById(id).parentElement, link = id => document.querySelector(`nav a[href='#${id}']`);
  document.querySelector("main").prepend(part("samples"));
  link("scores").before(link("samples"), " ");
  for (const id of ["wins", "distributions"]) part(id).hidden = link(id).hidden = true;
  for (const id of ["score", "model", "sort"]) part(id).hidden = true;
}
const search = document.getElementById("q");
search.addEventListener("input", later(120, () => change({q: search.value})));
for (const name of ["group", "score", "model", "sort"]) {
  document.getElementById(name).addEventListener("change", event => change({[name]: event.target.value, q: search.value}));
}
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
document.getElementById("more").addEventListener("click", showMore);
for (const link of document.querySelectorAll("a[href^='#']")) {  // the address says what is chosen, not where one is
  link.addEventListener("click", event => { event.preventDefault(); go(link.hash.slice(1)); });
}
window.addEventListener("hashchange", () => { state = fromAddress(); draw(); });
drawAbout();
fill("count", "Loading the pictures …");
draw();
document.addEventListener("DOMContentLoaded", () => {
  unreadable = JSON.parse(document.getElementById("unreadable").textContent);
  drawProblems();
  drawSamples();
  new IntersectionObserver(seen => seen.some(each => each.isIntersecting) && showMore(), {rootMargin: "1000px"})
    .observe(document.getElementById("more"));
});
