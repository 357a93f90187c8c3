// The page: a chat, and beside it what the model does for each token. It speaks to the server that
// it came from, in OpenAI's protocol, and to nobody else.

const ALTERNATIVES = 5;
const by = (id) => document.getElementById(id);
const make = (name, words = {}, ...inside) => {
  const made = Object.assign(document.createElement(name), words);
  made.append(...inside);
  return made;
};

let inside = null; // of /v1/inside
let turns = []; // the conversation so far
let tokens = []; // of the latest answer
let chosen = -1; // the one whose details are shown
let prompted = 0; // tokens before it
let running = null; // stops the answer that is being written
let counts = null; // how often each expert was chosen in it: [layers][experts]

// ---------------------------------------------------------------- the server

function headers() {
  const key = by("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const block of whole) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request() {
  const number = (id) => (by(id).value === "" ? null : Number(by(id).value));
  const shared = {
    model: inside.name,
    stream: true,
    stream_options: { include_usage: true },
    experts: true,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
  if (!inside.chat) {
    return ["v1/completions", { ...shared, prompt: turns.at(-1).content, logprobs: ALTERNATIVES }];
  }
  const system = by("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];
  return [
    "v1/chat/completions",
    { ...shared, messages, logprobs: true, top_logprobs: ALTERNATIVES },
  ];
}

// ---------------------------------------------------------------- one answer

async function answer() {
  const [route, body] = request();
  running = new AbortController();
  const said = { role: "assistant", content: "" };
  const shown = showTurn(inside.chat ? "assistant" : "continuation", "");
  const thought = make("span", { className: "thought", hidden: true });
  shown.before(thought);
  forget();
  busy(true);
  const begun = performance.now();
  let first = null;
  try {
    const response = await fetch(route, {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await reasonOf(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) showUsage(chunk.usage);
      for (const choice of chunk.choices) {
        const delta = choice.delta ?? { content: choice.text };
        if (delta.reasoning_content) {
          thought.hidden = false;
          thought.textContent += delta.reasoning_content;
        }
        if (delta.content) {
          said.content += delta.content;
          shown.textContent = said.content;
        }
        const came = tokensOf(choice);
        if (came.length) {
          first ??= performance.now();
          came.forEach(addToken);
          showSpeed(begun, first);
        }
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") by("problem").textContent = error.message;
  } finally {
    running = null;
    if (said.content && inside.chat) turns.push(said);
    busy(false);
    showSpeed(begun, first);
  }
}

function tokensOf(choice) {
  const experts = choice.experts ?? [];
  if (choice.logprobs?.content) {
    return choice.logprobs.content.map((entry, i) => ({
      text: entry.token,
      logprob: entry.logprob,
      others: entry.top_logprobs.map((other) => [other.token, other.logprob]),
      ...experts[i],
    }));
  }
  return (choice.logprobs?.tokens ?? []).map((text, i) => ({
    text,
    logprob: choice.logprobs.token_logprobs[i],
    others: Object.entries(choice.logprobs.top_logprobs[i]).sort((a, b) => b[1] - a[1]),
    ...experts[i],
  }));
}

function busy(now) {
  by("send").disabled = now;
  by("stop").disabled = !now;
  by("turns").setAttribute("aria-busy", String(now));
}

function showTurn(role, text) {
  const words = make("span", { textContent: text });
  const item = make("li", { className: role }, make("span", { className: "who", textContent: role }), words);
  by("turns").append(item);
  item.scrollIntoView({ block: "nearest" });
  return words;
}

// ---------------------------------------------------------------- each token

function forget() {
  tokens = [];
  chosen = -1;
  prompted = 0;
  const layers = inside.layers - inside.first_expert_layer;
  counts = Array.from({ length: layers }, () => new Array(inside.experts).fill(0));
  by("tokens").replaceChildren();
  by("problem").textContent = "";
  by("experts-said").textContent = "";
  draw();
  showCache();
}

const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥"));
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;

function addToken(token) {
  const index = tokens.push(token) - 1;
  (token.chosen ?? []).forEach((row, layer) => row.forEach((expert) => counts[layer][expert]++));
  const chip = make("span", { className: "token", textContent: visible(token.text), tabIndex: -1 });
  chip.setAttribute("role", "option");
  chip.setAttribute("aria-selected", "false");
  const drafted = token.drafted ? ", drafted and accepted" : "";
  chip.setAttribute("aria-label", `${visible(token.text)}, ${percent(token.logprob)}${drafted}`);
  chip.classList.toggle("drafted", Boolean(token.drafted));
  const share = Math.exp(token.logprob);
  chip.style.background = `color-mix(in srgb, var(--accent) ${Math.round(45 * share)}%, transparent)`;
  chip.addEventListener("click", () => choose(index, true));
  by("tokens").append(chip);
  if (index === 0) chip.tabIndex = 0;
  if (chosen === index - 1) choose(index, false); // follow the newest, unless another was chosen
  showCache();
}

function choose(index, focus) {
  const chips = by("tokens").children;
  if (chips[chosen]) {
    chips[chosen].setAttribute("aria-selected", "false");
    chips[chosen].tabIndex = -1;
  }
  chosen = index;
  chips[index].setAttribute("aria-selected", "true");
  chips[index].tabIndex = 0;
  if (focus) chips[index].focus();
  const token = tokens[index];
  const rows = token.others.map(([text, logprob]) => {
    const bar = make("meter", { min: 0, max: 1, value: Math.exp(logprob) });
    bar.setAttribute("aria-label", percent(logprob));
    return make(
      "tr",
      {},
      make("td", {}, make("code", { textContent: visible(text) })),
      make("td", {}, bar),
      make("td", { className: "number", textContent: percent(logprob) }),
    );
  });
  const title = `Token ${index + 1}: ${visible(token.text)}, ${percent(token.logprob)}`;
  const how = token.drafted
    ? "The MTP module had guessed it, and the model agreed."
    : inside.drafts
      ? "The model's own: no draft was right here."
      : "The model's own: nothing is drafted on this server.";
  by("detail").replaceChildren(
    make("p", { textContent: title }),
    make("p", { className: "hint", textContent: how }),
    make("table", {}, make("tbody", {}, ...rows)),
  );
  draw();
}

by("tokens").addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  let next = null;
  if (event.key in steps) next = chosen + steps[event.key];
  if (event.key === "Home") next = 0;
  if (event.key === "End") next = tokens.length - 1;
  if (next === null || !tokens.length) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(tokens.length - 1, next)), true);
});

// ---------------------------------------------------------------- experts, cache, speed

function draw() {
  const canvas = by("experts");
  const layers = counts?.length ?? 0;
  const none = !inside?.experts || !layers;
  for (const id of ["experts", "experts-title", "experts-hint", "experts-said"]) by(id).hidden = none;
  if (none) return;
  const cell = Math.max(4, Math.min(16, Math.floor(960 / inside.experts)));
  canvas.width = cell * inside.experts;
  canvas.height = cell * layers;
  const ink = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const probe = getComputedStyle(by("send"));
  const most = Math.max(1, ...counts.flat());
  ink.fillStyle = style.color;
  counts.forEach((row, layer) =>
    row.forEach((count, expert) => {
      ink.globalAlpha = (0.45 * count) / most;
      ink.fillRect(expert * cell, layer * cell, cell - 1, cell - 1);
    }),
  );
  ink.globalAlpha = 1;
  ink.fillStyle = probe.borderTopColor;
  const picked = tokens[chosen]?.chosen ?? [];
  picked.forEach((row, layer) =>
    row.forEach((expert) => ink.fillRect(expert * cell, layer * cell, cell - 1, cell - 1)),
  );
  by("experts-said").textContent = picked
    .map((row, layer) => `Layer ${layer + inside.first_expert_layer}: ${[...row].sort((a, b) => a - b).join(", ")}`)
    .join(". ");
}

const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${count.toFixed(unit ? 1 : 0)} ${units[unit]}`;
};

function showCache() {
  const held = prompted + tokens.length;
  const ours = held * inside.latent_bytes;
  const theirs = held * inside.mha_bytes;
  const bar = make("meter", { min: 0, max: Math.max(1, theirs), value: ours });
  bar.setAttribute("aria-label", "Latent cache as a share of that of standard attention");
  const saved = (100 * (1 - inside.latent_bytes / inside.mha_bytes)).toFixed(1);
  by("cache").replaceChildren(
    make("p", {
      textContent: `${held} tokens: ${bytes(ours)} of latents, where standard attention would hold ${bytes(theirs)} (${saved}% less).`,
    }),
    bar,
  );
}

function showUsage(usage) {
  prompted = usage.prompt_tokens;
  showCache();
  const cached = usage.prompt_tokens_details.cached_tokens;
  const drafts = usage.completion_tokens_details;
  const tried = drafts.accepted_prediction_tokens + drafts.rejected_prediction_tokens;
  by("cache").append(
    make("p", { textContent: `Of ${prompted} prompt tokens ${cached} were in the cache already.` }),
  );
  if (tried) {
    by("cache").append(
      make("p", { textContent: `Of ${tried} drafts ${drafts.accepted_prediction_tokens} were right.` }),
    );
  }
}

function showSpeed(begun, first) {
  const now = performance.now();
  const pairs = [["tokens", String(tokens.length)]];
  if (first !== null) {
    pairs.push(["to the first token", `${Math.round(first - begun)} ms`]);
    if (tokens.length > 1) {
      const rate = (1000 * (tokens.length - 1)) / Math.max(1, now - first);
      pairs.push(["then", `${rate.toFixed(1)} tokens/s`]);
    }
  }
  by("speed").replaceChildren(
    ...pairs.flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: value }),
    ]),
  );
}

// ---------------------------------------------------------------- what people do

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("prompt").value;
  if (running || !inside || !text.trim()) return;
  by("prompt").value = "";
  turns.push({ role: "user", content: text });
  showTurn("user", text);
  answer();
});

by("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
by("stop").addEventListener("click", () => running?.abort());
by("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  by("turns").replaceChildren();
  if (inside) forget();
  by("detail").replaceChildren(make("p", { className: "hint", textContent: "Nothing is written yet." }));
  by("prompt").focus();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
function showTheme() {
  by("theme").setAttribute("aria-pressed", String(isDark()));
  draw();
}
by("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
dark.addEventListener("change", showTheme);

async function meet() {
  const response = await fetch("v1/inside", { headers: headers() });
  if (!response.ok) {
    by("problem").textContent = await reasonOf(response);
    by("model").textContent = "no answer";
    return;
  }
  inside = await response.json();
  const sizes = [inside.parameters, inside.active_parameters].map((n) =>
    n >= 1e9 ? `${(n / 1e9).toFixed(1)}B` : `${(n / 1e6).toFixed(1)}M`,
  );
  by("model").textContent =
    `${inside.name}: ${sizes[0]} parameters, ${sizes[1]} active, ${inside.layers} layers, ` +
    `${inside.experts} experts, ${inside.precision}`;
  by("problem").textContent = "";
  if (!inside.chat) by("prompt-label").textContent = "Text to continue (a base model)";
  forget();
}
by("key").addEventListener("change", meet);
showTheme();
meet();
