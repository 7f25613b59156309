"use strict";
// Data, state and small helpers. Text goes into the page as text nodes only, so no text can become markup.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { domain: 0, router: data.startRouter, page: 0, token: 0, only: null, measure: "weight", trainingOf: "router" };
const watchers = [];

/** Call draw now, and again whenever one of these keys of the state changes. */
function watch(keys, draw) {
  watchers.push([keys, draw]);
  return draw();
}

function set(changes) {
  const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const [keys, draw] of watchers) if (keys.some((key) => changed.includes(key))) draw();
}

const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const percent = (value, digits = 0) => (value === null ? "–" : `${(100 * value).toFixed(digits)}%`);
const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const signed = (value, digits) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const experts = data.styles;

/** Inflate base64 of zlib: the arrays would be ten times the page otherwise. */
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const kept = new Map();

/** The same, once for each key; the two latest weights stay, for they are large. */
function cached(key, text) {
  if (!kept.has(key)) kept.set(key, inflate(text));
  const weights = [...kept.keys()].filter((name) => name.startsWith("weights"));
  if (weights.length > 2) kept.delete(weights.find((name) => name !== key));
  return kept.get(key);
}

// ---- choosing a domain and a router ----

function choices() {
  data.domains.forEach((domain, index) => byId("domain").append(el("option", { value: index }, domain.name)));
  data.shortRouters.forEach((name, index) => byId("router").append(el("option", { value: index }, name)));
  byId("domain").addEventListener("change", (event) => set({ domain: +event.target.value, page: 0, token: 0 }));
  byId("router").addEventListener("change", (event) => set({ router: +event.target.value }));
  byId("previous").addEventListener("click", () => stepRouter(-1));
  byId("next").addEventListener("click", () => stepRouter(1));
  watch(["domain"], () => { byId("domain").value = state.domain; });
  watch(["router"], () => {
    byId("router").value = state.router;
    byId("router").title = data.routers[state.router];
    byId("previous").disabled = state.router === 0;
    byId("next").disabled = state.router === data.routers.length - 1;
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "[") stepRouter(-1);
    if (event.key === "]") stepRouter(1);
  });
}

function stepRouter(by) {
  set({ router: Math.max(0, Math.min(data.routers.length - 1, state.router + by)) });
}

// ---- a tooltip that mouse, touch and keyboard share ----

const tip = byId("tip");

function showTip(anchor, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const box = anchor.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 8 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}

function hideTip() {
  tip.hidden = true;
}
