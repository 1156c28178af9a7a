// Asks the API of the same server and shows its answers. Everything shown is put in as text, never as markup.
"use strict";

const find = (id) => document.getElementById(id);
const METHODS = {
  personalised: "Ranked by the trained model.",
  fold_in: "Not in the training data: ranked from the liked items.",
  side_information: "Ranked by the items' texts alone.",
  popularity: "Nothing is known of this user: the most popular items.",
  static: "No model answers: a fixed list.",
};
const HISTORIES = {
  stale: "The history is older than the feature store allows.",
  last_good: "The feature store does not answer: the history is the last that was known.",
};
const SLIDER_PAUSE_MS = 120;
const shown = { user: "", debias: null, chosenItem: null, asked: 0, strangers: false };

// -- questions ------------------------------------------------------------------------------------------------------

async function post(route, body) {
  const headers = { "Content-Type": "application/json" };
  const token = find("token").value.trim();
  if (token) headers["Authorization"] = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(`../v1/${route}`, { method: "POST", headers, body: JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error([answer.message ?? `The server answered ${response.status}.`, answer.hint].filter(Boolean).join(" "));
  return { answer, degraded: response.headers.get("X-Degraded") };
}

const liked = () => [...new Set(find("liked").value.split(/[\s,;]+/).filter(Boolean))];

function question() {
  const recent = liked();
  const user = find("user").value.trim() || (recent.length ? "somebody new" : "");
  return { user, recent, k: Number(find("k").value) };
}

async function ask() {
  const { user, recent, k } = question();
  if (!user) return tell("Type a user, or the ids of some items that somebody liked.");
  const number = ++shown.asked; // an answer that a later question overtook is dropped
  find("answer").classList.add("busy");
  try {
    const body = { users: [user], k, compare: true, debias: shown.debias };
    if (recent.length) body.recent = { [user]: recent };
    const { answer, degraded } = await post("recommend", body);
    if (number !== shown.asked) return;
    shown.user = user;
    show(answer, degraded);
    remember();
  } catch (error) {
    if (number === shown.asked) tell(error.message);
  } finally {
    if (number === shown.asked) find("answer").classList.remove("busy");
  }
}

// -- answers --------------------------------------------------------------------------------------------------------

function tell(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

function show(answer, degraded) {
  tell("");
  const result = answer.results[0];
  const strength = answer.debias.toFixed(2);
  find("debias").value = answer.debias;
  find("lambda").value = strength;
  find("lambda-of-ranking").textContent = strength;
  const how = [METHODS[result.method] ?? result.method, HISTORIES[result.history], degraded && `Degraded: ${degraded}.`];
  const said = [...how, `Model ${answer.model_version}.`];
  find("how").textContent = said.filter(Boolean).join(" ");
  shown.strangers = result.cold;
  list("factual", result.factual ?? [], false);
  list("debiased", result.items, true);
  find("answer").hidden = false;
  if (shown.chosenItem) explain(shown.chosenItem.id, shown.chosenItem.title);
}

function list(id, items, moves) {
  find(id).replaceChildren(...items.map((item) => place(item, moves)));
}

function place(item, moves) {
  const entry = find("place").content.cloneNode(true);
  const part = (name) => entry.querySelector(`.${name}`);
  part("rank").textContent = item.rank;
  part("title").textContent = item.title || item.item_id;
  part("score").textContent = item.score.toPrecision(3);
  const change = item.rank_change;
  if (moves && change !== null && change !== 0) {
    part("move").textContent = `${change > 0 ? "▲" : "▼"} ${Math.abs(change)}`;
    part("move").classList.add(change > 0 ? "up" : "down");
    part("move").title = `Rank ${item.factual_rank} without debiasing`;
  }
  const button = part("item");
  button.dataset.item = item.item_id;
  button.title = `${item.title} (${item.item_id})`;
  button.addEventListener("click", () => explain(item.item_id, item.title));
  return entry;
}

async function explain(id, title) {
  shown.chosenItem = { id, title };
  for (const button of document.querySelectorAll(".item")) button.setAttribute("aria-pressed", String(button.dataset.item === id));
  const number = shown.asked;
  try {
    const { answer } = await post("explain", { user_id: shown.user, item_id: id, debias: shown.debias });
    if (number === shown.asked && shown.chosenItem?.id === id) why(answer, title);
  } catch (error) {
    tell(error.message);
  }
}

function why(answer, title) {
  const parts = [element("h2", "Why"), element("p", answer.title || title)];
  const { explanation } = answer;
  if (explanation) {
    const figures = [
      ["Total effect (factual score)", explanation.total_effect],
      ["Direct effect of the text", explanation.natural_direct_effect],
      ["Through the user's taste", explanation.total_natural_indirect_effect],
      [`Taken out, λ = ${answer.debias.toFixed(2)}`, explanation.removed],
      ["Debiased score", explanation.debiased_score],
      ["Propensity of the text", explanation.propensity],
    ].map(([name, value]) => [name, value.toFixed(3)]);
    figures.push(["Rank among all items", `${explanation.factual_rank} → ${explanation.debiased_rank}`]);
    const table = element("dl");
    for (const [name, value] of figures) table.append(element("dt", name), element("dd", value));
    parts.push(table);
  } else {
    const reason = shown.strangers ? "Scores are taken apart for users of the training data only." : `No explanation: ${answer.reason}.`;
    parts.push(element("p", reason, "hint"));
  }
  if (answer.nearest_liked_items.length) {
    const near = element("ul");
    for (const item of answer.nearest_liked_items) near.append(element("li", `${item.title || item.item_id} (${item.similarity.toFixed(2)})`));
    parts.push(element("h3", "Nearest items the user liked"), near);
  }
  if (answer.profile) parts.push(element("h3", "The text used"), element("blockquote", answer.profile));
  find("why").replaceChildren(...parts);
}

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

// -- the page's address holds the question, so that it can be passed on -------------------------------------------------

function remember() {
  const kept = new URLSearchParams();
  for (const id of ["user", "liked", "k"]) if (find(id).value) kept.set(id, find(id).value);
  if (shown.debias !== null) kept.set("debias", shown.debias);
  history.replaceState(null, "", `#${kept}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const id of ["user", "liked", "k"]) if (kept.has(id)) find(id).value = kept.get(id);
  const debias = Number(kept.get("debias") ?? NaN);
  shown.debias = debias >= 0 && debias <= 1 ? debias : null;
  if (kept.has("user") || kept.has("liked")) ask();
}

let pause;
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  shown.chosenItem = null;
  find("why").replaceChildren(element("h2", "Why"), element("p", "Choose an item to see what its score is made of.", "hint"));
  ask();
});
find("debias").addEventListener("input", () => {
  shown.debias = Number(find("debias").value);
  find("lambda").value = shown.debias.toFixed(2);
  clearTimeout(pause);
  pause = setTimeout(ask, SLIDER_PAUSE_MS);
});
find("chosen").addEventListener("click", () => {
  shown.debias = null;
  ask();
});
recall();
