// Heat maps, matrices and likeness: tables, so that a screen reader and a printer can read them too.

const EVEN = 1 / experts.length;

/** How far the share that lies furthest from even does so: the end of the colour scale. */
function furthest(shares) {
  return Math.max(1e-6, ...shares.flat(2).map((value) => Math.abs(value - EVEN)));
}

/** A table of shares, coloured by their distance from even, numbers in the cells. rows: [[name, values, router]]. */
function shareTable(caption, rows, end, digits) {
  const head = el("tr", {}, el("th", {}), ...experts.map((_, index) => el("th", { scope: "col", title: data.experts[index] }, `E${index}`)));
  const body = rows.map(([name, values, router]) =>
    el("tr", { class: router !== null && router === state.router ? "chosen" : null },
      el("th", { scope: "row" }, router === null ? name : el("button", { type: "button", onclick: () => set({ router }) }, name)),
      ...values.map((value) => shadedCell(value - EVEN, end, percent(value, digits)))));
  return el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, ...body));
}

/** A cell in one of two hues: orange above zero, violet below. */
function shadedCell(value, end, text) {
  return el("td", { class: value < 0 ? "minus" : "plus", "--h": `${(75 * Math.min(1, Math.abs(value) / end)).toFixed(0)}%` }, text);
}

function mapSection() {
  byId("measure").addEventListener("change", (event) => set({ measure: event.target.value }));
  watch(["measure", "router"], () => {
    const shares = data.shares[state.measure];
    const end = furthest(shares);
    const maps = data.domains.map((domain, index) =>
      el("div", { class: "tall" },
        shareTable(domain.name, data.shortRouters.map((name, router) => [name, shares[index][router], router]), end, 0)));
    const places = [...byId("maps").children].map((child) => child.scrollTop);
    byId("maps").replaceChildren(...maps);
    maps.forEach((map, index) => { map.scrollTop = places[index] || 0; });
    byId("ramp").replaceChildren(percent(Math.max(0, EVEN - end)), el("i"), percent(EVEN + end), ` · even: ${percent(EVEN, 1)}`);
  });
}

function matricesSection() {
  watch(["measure", "router"], () => {
    const shares = data.shares[state.measure];
    const end = furthest(shares);
    const rows = (of) => data.domains.map((domain, index) => [domain.name, of(index), null]);
    const average = (index) => experts.map((_, expert) => mean(shares[index].map((router) => router[expert])));
    byId("matrices").replaceChildren(
      el("div", {}, shareTable(`Domain by expert in ${data.routers[state.router]}`, rows((index) => shares[index][state.router]), end, 1)),
      el("div", {}, shareTable("Domain by expert, mean over routers", rows(average), end, 1)));
  });
}

/** A square matrix of cosines in two hues; the diagonal says nothing. */
function cosineTable(caption, matrix) {
  const head = el("tr", {}, el("th", {}), ...experts.map((_, index) => el("th", { scope: "col" }, `E${index}`)));
  const body = matrix.map((row, i) =>
    el("tr", {}, el("th", { scope: "row" }, `E${i}`),
      ...row.map((value, j) => i === j ? el("td", {}, "") : shadedCell(value, 1, signed(value, 2)))));
  return el("table", {}, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, ...body));
}

function sizesTable() {
  const head = el("tr", {}, ...["", "norm", "eff. rank", "maturity"].map((name) => el("th", { scope: "col" }, name)));
  const maturity = experts.map((_, expert) => mean(data.maturity.map((row) => row[expert] ?? 0)));
  const body = experts.map((_, expert) =>
    el("tr", {}, el("th", { scope: "row", title: data.experts[expert] }, `E${expert}`),
      el("td", {}, fixed(data.norm[expert], 2)), el("td", {}, fixed(data.rank[expert], 1)), el("td", {}, fixed(maturity[expert], 2))));
  return el("table", {}, el("caption", {}, "Sizes"), el("thead", {}, head), el("tbody", {}, ...body));
}

function alikeSection() {
  watch(["router"], () => {
    byId("similarity").replaceChildren(
      el("div", {}, cosineTable("All linears together", data.similarity)),
      el("div", {}, cosineTable(`The linears of ${data.routers[state.router]}`, data.similarityByRouter[state.router])),
      el("div", {}, sizesTable()));
  });
  const titles = { prune: "Prune", merge: "Merge", look: "Look at", keep: "Keep" };
  const cards = data.suggestions.map((suggestion) =>
    el("div", { class: `suggestion ${suggestion.action}` },
      el("b", {}, `${titles[suggestion.action]} expert${suggestion.experts.length > 1 ? "s" : ""} ${suggestion.experts.join(" and ")}`),
      el("span", {}, suggestion.reason)));
  byId("suggestions").replaceChildren(...(cards.length ? cards : [
    el("div", { class: "suggestion keep" }, el("b", {}, "Keep them all"), el("span", {}, data.keepReason))]));
}
