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
const FEW_COLUMNS = 4; // up to which their fields are in sight without being asked for
const NOTHING_LEFT = "No item is left: none passes the filters, or the user knows them all.";
const shown = { user: "", recent: [], debias: null, chosenItem: null, asked: 0, explained: 0, strangers: false, filters: {}, columns: [] };

// -- questions ------------------------------------------------------------------------------------------------------

async function request(method, route, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const token = find("token").value.trim();
  if (token) headers["Authorization"] = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(`../v1/${route}`, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error([answer.message ?? `The server answered ${response.status}.`, answer.hint].filter(Boolean).join(" "));
  return { answer, degraded: response.headers.get("X-Degraded") };
}

const post = (route, body) => request("POST", route, body);
const liked = () => [...new Set(find("liked").value.split(",").map((id) => id.trim()).filter(Boolean))]; // ids may hold blanks

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
    if (Object.keys(shown.filters).length) body.filters = shown.filters;
    const { answer, degraded } = await post("recommend", body);
    if (number !== shown.asked) return;
    shown.user = user;
    shown.recent = recent;
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
  shown.explained++; // what is still asked for was of the ranking before
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
  find(id).replaceChildren(...(items.length ? items.map((item) => place(item, moves)) : [element("li", NOTHING_LEFT, "hint")]));
}

function place(item, moves) {
  const entry = find("place").content.cloneNode(true);
  const part = (name) => entry.querySelector(`.${name}`);
  part("rank").textContent = item.rank;
  part("title").textContent = item.title || item.item_id;
  part("score").textContent = Number.isInteger(item.score) ? item.score : item.score.toPrecision(3); // a whole one is a count
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
  const number = ++shown.explained; // as with `asked`
  try {
    const { answer } = await post("explain", { user_id: shown.user, item_id: id, recent: shown.recent, debias: shown.debias });
    if (number === shown.explained) why(answer, title);
  } catch (error) {
    if (number === shown.explained) tell(error.message);
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
    const reason = shown.strangers ? "Scores are taken apart for users with training interactions only." : `No explanation: ${answer.reason}.`;
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

// -- filters: `shown.filters` is as the API takes it, with a field for each column that the model tells of -------------------

const readable = (column) => column.replaceAll("_", " ");
const chosen = (column) => (Array.isArray(shown.filters[column]) ? shown.filters[column] : []);

async function offer() {
  try {
    const { answer } = await request("GET", "model");
    // values that are not listed are texts of single items: nothing to choose from
    shown.columns = Object.entries(answer.model.filters).filter(([, told]) => told.kind === "numbers" || told.values.length);
    fields();
    find("filters").open = shown.columns.length <= FEW_COLUMNS;
  } catch (error) {
    shown.columns = [];
    find("columns").replaceChildren(element("p", error.message, "hint"));
  }
  sayFilters();
}

function fields() {
  find("columns").replaceChildren(
    ...shown.columns.map(([column, told]) => {
      const field = find("column").content.cloneNode(true).firstElementChild;
      field.querySelector("legend").textContent = readable(column);
      field.append(...(told.kind === "numbers" ? bounds(column, told) : values(column, told)));
      return field;
    }),
  );
}

function bounds(column, told) {
  const [least, most] = ["min", "max"].map((side) => {
    const input = element("input");
    Object.assign(input, { type: "number", step: "any", placeholder: told[side], value: shown.filters[column]?.[side] ?? "" });
    input.setAttribute("aria-label", `${readable(column)}, ${side === "min" ? "from" : "to"}`);
    input.addEventListener("change", () => {
      const { [side]: before, ...other } = shown.filters[column] ?? {};
      filterBy(column, input.value === "" ? other : { ...other, [side]: Number(input.value) });
    });
    return input;
  });
  return [least, element("span", "to"), most];
}

function values(column, told) {
  const areAllListed = told.values.length === told.num_values;
  const more = element(areAllListed ? "select" : "input");
  const options = told.values.map((value) => new Option(value));
  const list = element("datalist");
  more.setAttribute("aria-label", readable(column));
  if (areAllListed) more.append(new Option("", ""), ...options);
  else {
    list.id = `values-of-${column}`;
    list.append(...options);
    more.setAttribute("list", list.id);
  }
  const chips = element("span", "", "chips");
  const show = () => {
    const empty = chosen(column).length ? "or ..." : "any";
    if (areAllListed) more.options[0].text = empty;
    else more.placeholder = empty;
    chips.replaceChildren(...chosen(column).map(chip));
  };
  const choose = (wanted) => {
    filterBy(column, wanted);
    show();
  };
  const chip = (value) => {
    const made = element("button", value, "chip");
    Object.assign(made, { type: "button", title: `Without ${value}` });
    made.addEventListener("click", () => choose(chosen(column).filter((other) => other !== value)));
    return made;
  };
  more.addEventListener("change", () => {
    const value = more.value.trim();
    more.value = "";
    if (value) choose([...new Set([...chosen(column), value])]);
  });
  show();
  return [more, list, chips];
}

function filterBy(column, wanted) {
  shown.filters = { ...shown.filters, [column]: wanted };
  if (!Object.keys(wanted).length) delete shown.filters[column];
  sayFilters();
  if (!find("answer").hidden) ask();
}

function sayFilters() {
  const said = Object.entries(shown.filters).map(([column, wanted]) => {
    const range = [wanted.min === undefined ? "" : `from ${wanted.min}`, wanted.max === undefined ? "" : `to ${wanted.max}`];
    return `${readable(column)} ${(Array.isArray(wanted) ? wanted.join(" or ") : range.join(" ")).trim()}`;
  });
  find("filtered").textContent = said.join("; ");
  find("unfilter").hidden = !said.length;
  find("filters").hidden = !said.length && !shown.columns.length && !find("token").value; // with a token, why there are none
}

// -- the page's address holds the question, so that it can be passed on -------------------------------------------------

function remember() {
  const kept = new URLSearchParams();
  for (const id of ["user", "liked", "k"]) if (find(id).value) kept.set(id, find(id).value);
  if (shown.debias !== null) kept.set("debias", shown.debias);
  for (const [name, wanted] of Object.entries(shown.filters)) {
    const texts = Array.isArray(wanted) ? wanted : [`${wanted.min ?? ""}..${wanted.max ?? ""}`];
    for (const text of texts) kept.append("filter", `${name}=${text}`); // as cllmr recommend --filter
  }
  history.replaceState(null, "", `#${kept}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const id of ["user", "liked", "k"]) if (kept.has(id)) find(id).value = kept.get(id);
  const debias = Number(kept.get("debias") ?? NaN);
  shown.debias = debias >= 0 && debias <= 1 ? debias : null;
  for (const text of kept.getAll("filter")) {
    const [, column, wanted] = text.match(/^([^=]+)=(.+)$/s) ?? [];
    const range = wanted?.match(/^(?<min>-?[\d.]*?)\.\.(?<max>-?[\d.]*)$/)?.groups;
    const sides = Object.entries(range ?? {}).filter(([, number]) => number);
    if (range) shown.filters[column] = Object.fromEntries(sides.map(([side, number]) => [side, Number(number)]));
    else if (column) shown.filters[column] = [...chosen(column), wanted];
  }
  if (kept.has("user") || kept.has("liked")) ask();
  offer();
}

let pause;
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  shown.chosenItem = null;
  shown.explained++;
  find("why").replaceChildren(element("h2", "Why"), element("p", "Choose an item to see what its score is made of.", "hint"));
  ask();
});
find("debias").addEventListener("input", () => {
  shown.debias = Number(find("debias").value);
  find("lambda").value = shown.debias.toFixed(2);
  clearTimeout(pause);
  pause = setTimeout(ask, SLIDER_PAUSE_MS);
});
find("token").addEventListener("change", offer);
find("unfilter").addEventListener("click", () => {
  shown.filters = {};
  fields();
  sayFilters();
  if (!find("answer").hidden) ask();
});
find("chosen").addEventListener("click", () => {
  shown.debias = null;
  ask();
});
recall();
