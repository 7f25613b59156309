// The text, token by token: a page at a time, so that a hundred thousand tokens stay quick.

const PAGE = 1500;
const NO_LOSS = 255;
const view = { pieces: [], ids: null, losses: null, weights: null, starts: [], nodes: [], from: 0, key: 0 };

async function loadTokens() {
  const key = ++view.key;
  const domain = data.view[state.domain];
  const [ids, losses, weights] = await Promise.all([
    cached(`ids ${state.domain}`, domain.ids),
    cached(`losses ${state.domain}`, domain.losses),
    cached(`weights ${state.domain} ${state.router}`, domain.weights[state.router]),
  ]);
  if (key !== view.key) return; // another choice was made meanwhile
  Object.assign(view, { pieces: domain.pieces, ids: new Uint32Array(ids.buffer), losses, weights, starts: domain.starts });
  drawLegend();
  drawPage();
}

const weightsOf = (token) => view.weights.subarray(token * experts.length, (token + 1) * experts.length);

function topExpert(token) {
  const weights = weightsOf(token);
  return weights.indexOf(Math.max(...weights));
}

function drawLegend() {
  const counts = new Array(experts.length).fill(0);
  for (let token = 0; token < view.ids.length; token++) counts[topExpert(token)]++;
  const chips = experts.map((expert, index) =>
    el("button", { class: "chip", type: "button", "aria-pressed": String(state.only === index), "--c": expert.colour,
      "--s": expert.line, title: data.experts[index], onclick: () => set({ only: state.only === index ? null : index }) },
      el("i"), `expert ${index}`, el("small", {}, percent(counts[index] / view.ids.length))));
  byId("legend").replaceChildren(...chips);
}

function drawPage() {
  const pages = Math.max(1, Math.ceil(view.ids.length / PAGE));
  view.from = state.page * PAGE;
  const until = Math.min(view.ids.length, view.from + PAGE);
  const numbers = byId("numbers").checked;
  const nodes = [];
  view.nodes = [];
  let current = view.starts.findLastIndex((start) => start <= view.from);
  for (let token = view.from; token < until; token++) {
    while (view.starts[current + 1] <= token) current++;
    if (token === view.from || view.starts[current] === token) nodes.push(documentLine(current, token));
    const node = tokenNode(token, numbers);
    view.nodes.push(node);
    nodes.push(node);
  }
  byId("text").replaceChildren(...nodes);
  byId("page").textContent = `Page ${state.page + 1} of ${pages} · tokens ${(view.from + 1).toLocaleString("en")} to ${until.toLocaleString("en")}`;
  byId("page-back").disabled = state.page === 0;
  byId("page-on").disabled = state.page === pages - 1;
  const domain = data.domains[state.domain];
  byId("shown").textContent = view.ids.length < domain.tokens
    ? `Shown are the first ${view.ids.length.toLocaleString("en")} of ${domain.tokens.toLocaleString("en")} tokens; every figure below counts them all.` : "";
  document.documentElement.dataset.ready = `${state.domain}/${state.router}/${state.page}`;
}

function documentLine(index, token) {
  const goesOn = view.starts[index] < token ? " (continued)" : "";
  return el("div", { class: "document", role: "presentation" }, `document ${index + 1} of ${view.starts.length}${goesOn}`);
}

function tokenNode(token, numbers) {
  const expert = topExpert(token);
  const piece = view.pieces[view.ids[token]];
  const strength = 22 + 58 * Math.max(0, (weightsOf(token)[expert] / 255 - 1 / experts.length) / (1 - 1 / experts.length + 1e-9));
  const off = state.only !== null && state.only !== expert ? " off" : "";
  return el("span", { class: `token${off}`, role: "option", "data-token": token, "data-expert": expert,
    id: `t${token}`, "--c": experts[expert].colour, "--s": experts[expert].line, "--p": `${strength.toFixed(0)}%` },
    piece === "" ? "\u2060·" : piece, numbers ? el("sub", {}, String(expert)) : null);
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

function describe(token) {
  const piece = view.pieces[view.ids[token]];
  const text = piece === "" ? "(rest of a character)" : visible(piece);
  const loss = view.losses[token] === NO_LOSS ? "not predicted" : `loss ${(view.losses[token] / 20).toFixed(2)}`;
  const weights = weightsOf(token);
  // A mixture may have far more experts than a tooltip has lines.
  const largest = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 8).sort((a, b) => a - b);
  return [
    el("p", {}, el("b", {}, text), ` · ${loss}`),
    el("p", {}, data.routers[state.router]),
    ...largest.map((expert) =>
      el("div", { class: "weight" }, el("span", {}, `E${expert}`),
        el("i", { "--c": experts[expert].colour, "--w": `${(weights[expert] / 2.55).toFixed(1)}%` }),
        el("span", {}, percent(weights[expert] / 255)))),
    largest.length < experts.length ? el("p", {}, `and ${experts.length - largest.length} with less`) : null,
  ].filter(Boolean);
}

/** Move to a token, on its page, and say what it is. */
function point(token) {
  const last = view.ids.length - 1;
  const to = Math.max(0, Math.min(last, token));
  set({ token: to, page: Math.floor(to / PAGE) });
  const node = view.nodes[to - view.from];
  byId("text").querySelector(".on")?.classList.remove("on");
  node.classList.add("on");
  byId("text").setAttribute("aria-activedescendant", node.id);
  node.scrollIntoView({ block: "nearest" });
  showTip(node, ...describe(to));
}

function tokensSection() {
  const text = byId("text");
  const tokenAt = (event) => event.target.closest?.(".token");
  text.addEventListener("pointerover", (event) => {
    const node = tokenAt(event);
    if (node) showTip(node, ...describe(+node.dataset.token));
  });
  text.addEventListener("pointerleave", hideTip);
  text.addEventListener("click", (event) => { const node = tokenAt(event); if (node) point(+node.dataset.token); });
  text.addEventListener("blur", hideTip);
  text.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 12, ArrowUp: -12, PageDown: PAGE, PageUp: -PAGE };
    if (event.key in moves) point(state.token + moves[event.key]);
    else if (event.key === "Home") point(view.from);
    else if (event.key === "End") point(view.from + view.nodes.length - 1);
    else if (event.key === "Escape") hideTip();
    else return;
    event.preventDefault();
  });
  const turn = (by) => { hideTip(); byId("text").scrollTop = 0; set({ page: state.page + by, token: (state.page + by) * PAGE }); };
  byId("page-back").addEventListener("click", () => turn(-1));
  byId("page-on").addEventListener("click", () => turn(1));
  byId("numbers").addEventListener("change", drawPage);
  watch(["only"], () => { if (view.ids) { drawLegend(); drawPage(); } });
  watch(["page"], () => { if (view.ids) drawPage(); });
  watch(["domain", "router"], () => { hideTip(); loadTokens(); });
}
