// Charts in SVG: information per router, curves over training, bars of worth.

const NICE = [1, 2, 2.5, 5, 10];

/** Round tick values from low to high. */
function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = NICE.map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(+value.toPrecision(6));
  return found;
}

// ---- information ----

function informationSection() {
  const special = data.specialisation;
  if (special === null) {
    byId("specialisation-lead").textContent = "That takes two domains or more: give --data several times.";
    byId("information").parentElement.querySelector("details").hidden = true;
    matricesSection();
    return;
  }
  byId("specialisation-lead").textContent =
    `Mutual information between domain and expert, in bits, router by router: 0 when all domains use the same mixture, ${fixed(special.maximum, 2)} at most. ` +
    `Grey is chance: the middle 95% of ${special.permutations} shuffles of whole ${special.unit} among the domains. A filled dot lies above it.`;
  watch(["router"], () => {
    const place = byId("information");
    place.replaceChildren(informationChart(special));
    const dot = place.querySelector(".chosen").getBoundingClientRect(), frame = place.getBoundingClientRect();
    if (dot.left < frame.left || dot.right > frame.right) place.scrollLeft += dot.left - frame.left - frame.width / 2;
  });
  byId("information-table").replaceChildren(informationTable(special));
  matricesSection();
}

function informationChart(special) {
  const count = data.routers.length;
  const step = Math.max(20, Math.min(90, 900 / count));
  const [left, top, height] = [52, 18, 220];
  const width = left + step * count + 16;
  const highest = 1.08 * Math.max(...special.observed.slice(0, count), ...special.high.slice(0, count), 1e-6);
  const x = (router) => left + step * (router + 0.5);
  const y = (value) => top + height * (1 - value / highest);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${top + height + 46}`, role: "img", style: `min-width:${0.75 * width}px;max-width:${1.15 * width}px`,
    "aria-label": "Mutual information of each router, with its chance level; the table below has the numbers" });
  for (const value of ticks(0, highest)) {
    chart.append(svg("line", { class: "axis", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  for (let router = 0; router < count; router++) {
    const inside = special.observed[router] <= special.high[router];
    chart.append(
      svg("line", { class: "band", x1: x(router), x2: x(router), y1: y(special.low[router]), y2: y(special.high[router]) }),
      svg("line", { class: "mean", x1: x(router) - 6, x2: x(router) + 6, y1: y(special.chance[router]), y2: y(special.chance[router]) }),
      svg("circle", { class: `dot${inside ? " inside" : ""}${router === state.router ? " chosen" : ""}`, cx: x(router), cy: y(special.observed[router]), r: router === state.router ? 7 : 5 }));
    if (count <= 40 || router % Math.ceil(count / 40) === 0) {
      chart.append(svg("text", { x: x(router), y: top + height + 18, "text-anchor": "middle", class: router === state.router ? "strong" : null }, data.shortRouters[router].slice(-6)));
    }
    const hit = svg("rect", { class: "hit", x: x(router) - step / 2, y: top, width: step, height, onclick: () => set({ router }) });
    hit.addEventListener("pointerenter", () => showTip(hit, el("p", {}, el("b", {}, data.routers[router])),
      el("div", {}, `${fixed(special.observed[router], 4)} bits · chance ${fixed(special.chance[router], 4)}, 95% below ${fixed(special.high[router], 4)} · p = ${fixed(special.pValue[router], 3)}`)));
    hit.addEventListener("pointerleave", hideTip);
    chart.append(hit);
  }
  chart.append(svg("text", { x: left + (step * count) / 2, y: top + height + 40, "text-anchor": "middle" }, "router"),
    svg("text", { x: left - 8, y: top - 2, "text-anchor": "end" }, "bits"));
  return chart;
}

function informationTable(special) {
  const names = [...data.routers, "mean of all"];
  const head = ["router", "bits", "chance", "chance, 95%", "p"].map((name) => el("th", { scope: "col" }, name));
  const rows = names.map((name, i) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, fixed(special.observed[i], 4)), el("td", {}, fixed(special.chance[i], 4)),
      el("td", {}, `${fixed(special.low[i], 4)} to ${fixed(special.high[i], 4)}`), el("td", {}, fixed(special.pValue[i], 3))));
  return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}

// ---- training ----

function trainingSection() {
  const history = data.history;
  if (history === null) {
    byId("training-lead").textContent = "This run kept no log of its routers. moelora train does; in a script of your own, give the Trainer moelora.MoELoraCallback().";
    byId("training-pick").hidden = true;
    return;
  }
  byId("training-lead").textContent = `What training logged at ${history.steps.length} points up to step ${history.steps.at(-1)}: each point counts the training tokens since the one before.`;
  byId("training-of").addEventListener("change", (event) => set({ trainingOf: event.target.value }));
  watch(["router", "trainingOf"], () => {
    const name = data.routers[state.router];
    const chosen = state.trainingOf === "router" && history.routers[name] ? [history.routers[name]] : Object.values(history.routers);
    const title = chosen.length === 1 ? name : `mean of ${chosen.length} routers`;
    const byExpert = (key) => experts.map((_, expert) => history.steps.map((_, i) => mean(chosen.map((series) => series[key][i][expert] ?? 0))));
    const overall = (key) => [history.steps.map((_, i) => mean(chosen.map((series) => series[key][i])))];
    const even = Math.log(experts.length);
    byId("curves").replaceChildren(
      curveChart("Load", `${title} · share of assignments, dotted: even`, byExpert("expert_load"), 1 / experts.length, (v) => percent(v)),
      curveChart("Entropy", `${title} · nats, dotted: undecided`, overall("entropy"), even, (v) => String(v)),
      curveChart("Maturity", `${title} · 0 new, 1 mature`, byExpert("maturity"), null, (v) => String(v)));
  });
}

function curveChart(title, note, lines, reference, format) {
  const [width, height, left, right, top, bottom] = [400, 240, 46, 34, 10, 26];
  const steps = data.history.steps;
  const all = lines.flat().concat(reference === null ? [] : [reference]);
  const spread = Math.max(...all) - Math.min(...all);
  const high = Math.max(...all) + 0.08 * (spread || 1);
  const low = Math.max(0, Math.min(...all) - 0.08 * (spread || 1));
  const x = (i) => steps.length === 1 ? (left + width - right) / 2 : left + ((steps[i] - steps[0]) / (steps.at(-1) - steps[0])) * (width - left - right);
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} over training: ${note}` });
  for (const value of ticks(low, high)) {
    chart.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const i of new Set([0, Math.floor((steps.length - 1) / 2), steps.length - 1])) {
    chart.append(svg("text", { x: x(i), y: height - 6, "text-anchor": "middle" }, `${i === steps.length - 1 ? "step " : ""}${steps[i]}`));
  }
  if (reference !== null) chart.append(svg("line", { class: "limit", x1: left, x2: width - right, y1: y(reference), y2: y(reference) }));
  lines.forEach((line, index) => {
    const expert = lines.length === 1 ? { colour: "var(--accent)", dash: "" } : experts[index];
    chart.append(svg("polyline", { class: "curve", points: line.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" "), stroke: expert.colour, "stroke-dasharray": expert.dash }));
    if (steps.length === 1) chart.append(svg("circle", { cx: x(0), cy: y(line[0]), r: 4, fill: expert.colour }));
  });
  if (lines.length > 1) labels(lines.map((line) => y(line.at(-1)))).forEach((place, index) =>
    chart.append(svg("text", { class: "strong", x: width - right + 6, y: place + 4 }, `E${index}`)));
  return el("figure", {}, el("figcaption", {}, title, " ", el("small", {}, note)), chart);
}

/** Heights for labels, moved apart where curves end close together. */
function labels(heights, gap = 13) {
  const order = heights.map((_, index) => index).sort((a, b) => heights[a] - heights[b]);
  const placed = [...heights];
  for (let i = 1; i < order.length; i++) placed[order[i]] = Math.max(placed[order[i]], placed[order[i - 1]] + gap);
  return placed;
}

// ---- worth ----

function worthSection() {
  if (data.worth === null) {
    byId("worth-lead").textContent = "The loss without each expert was not measured: --worth-tokens was 0, or there is only one expert.";
    return;
  }
  const held = data.domains.every((domain) => domain.heldOut) ? "held-out loss" : "loss on the texts given";
  byId("worth-lead").textContent = `How much the ${held} rises, in nats per token, when one expert is removed from every router and the others are routed as if it had never been. Whiskers: two standard errors. A bar to the left means the domain does better without it.`;
  const extremes = data.worth.flatMap((row, domain) => row.flatMap((value, expert) => {
    const error = 2 * (data.worthError[domain][expert] ?? 0);
    return value === null ? [] : [value - error, value + error];
  }));
  const range = [Math.min(0, ...extremes), Math.max(1e-6, ...extremes)];
  byId("worths").replaceChildren(...data.domains.map((domain, index) => worthChart(domain, index, range)));
}

function worthChart(domain, index, [low, high]) {
  const [width, row, left, right] = [400, 30, 34, 72];
  const height = row * experts.length + 26;
  const x = (value) => left + ((value - low) / (high - low)) * (width - left - right);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${domain.name}: ${data.worth[index].map((value, expert) => `expert ${expert} ${signed(value, 4)}`).join(", ")}` });
  for (const value of ticks(low, high, 3)) {
    chart.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: 0, y2: height - 22 }),
      svg("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, String(value)));
  }
  data.worth[index].forEach((value, expert) => {
    const middle = row * expert + row / 2;
    chart.append(svg("text", { x: 0, y: middle + 4, class: "strong" }, `E${expert}`));
    if (value === null) return;
    const error = 2 * (data.worthError[index][expert] ?? 0);
    chart.append(
      svg("rect", { x: Math.min(x(0), x(value)), y: middle - 9, width: Math.abs(x(value) - x(0)), height: 18, rx: 3, fill: experts[expert].colour, "data-worth": value }),
      error ? svg("line", { class: "whisker", x1: x(value - error), x2: x(value + error), y1: middle, y2: middle }) : "",
      svg("text", { x: width, y: middle + 4, "text-anchor": "end" }, signed(value, 4)));
  });
  chart.append(svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: height - 22 }));
  return el("figure", {}, el("figcaption", {}, domain.name, " ", el("small", {}, `loss ${fixed(domain.loss, 3)} · on ${domain.worthTokens.toLocaleString("en")} tokens`)), chart);
}

choices();
tokensSection();
mapSection();
informationSection();
trainingSection();
alikeSection();
worthSection();
