"use strict";
// Everything from the run is put on the page with textContent: it was written by a model and is never markup.
(function () {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const byId = (id) => document.getElementById(id);

  // Control, direction and zero-width characters would hide or reorder what stands there: pipeline.text writes the same.
  const STEERING = new RegExp(page.steering, "gu");
  function visible(text) {
    return String(text).replace(STEERING, (character) => {
      const code = character.codePointAt(0);
      const [mark, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
      return "\\" + mark + code.toString(16).padStart(digits, "0");
    });
  }

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      // data- is read by this script alone, which compares it with what stands in the run
      node.setAttribute(name, value === true ? "" : name.startsWith("data-") ? value : visible(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined) node.append(child instanceof Node ? child : visible(child)); // append makes text of a string
    }
    return node;
  }

  function num(value, digits) {
    if (value === null || value === undefined) return "unknown";
    if (typeof value !== "number") return String(value);
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e6 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(digits || 4)));
    return text.replace("-", "\u2212");
  }
  const signed = (value) => (typeof value === "number" && value > 0 ? "+" : "") + num(value, 3);

  // ---- curves: a cursor that reads the values -------------------------------------------------------------------
  function cursorOf(chart) {
    const data = page.charts[chart.dataset.name];
    const svg = chart.querySelector("svg");
    const readout = chart.parentElement.querySelector(".readout");
    const [left, right, top, bottom] = data.box;
    const [from, to] = data.limits;
    let line = null;
    let position = -1;
    function show(next) {
      position = Math.max(0, Math.min(page.iterations.length - 1, next));
      const x = left + ((page.iterations[position] - from) / (to - from)) * (right - left);
      if (!line) {
        line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        line.setAttribute("class", "cursor");
        svg.append(line);
      }
      for (const [name, value] of [["x1", x], ["x2", x], ["y1", top], ["y2", bottom]]) line.setAttribute(name, value);
      const values = Object.entries(data.series).filter(([, v]) => v[position] !== null)
        .map(([label, v]) => label + " " + num(v[position]));
      readout.textContent = visible("iteration " + page.iterations[position] + ": " + (values.join(", ") || "nothing stored"));
    }
    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const wanted = from + ((x - left) / (right - left)) * (to - from);
      let best = 0;
      page.iterations.forEach((k, i) => {
        if (Math.abs(k - wanted) < Math.abs(page.iterations[best] - wanted)) best = i;
      });
      return best;
    }
    chart.addEventListener("pointermove", (event) => show(nearest(event)));
    chart.addEventListener("focus", () => { if (position < 0) show(page.iterations.length - 1); });
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
      if (step) show(position + step);
      else if (event.key === "Home") show(0);
      else if (event.key === "End") show(page.iterations.length - 1);
      else if (event.key === "Enter") go(page.iterations[position]);
      else return;
      event.preventDefault();
    });
  }
  document.querySelectorAll(".chart[data-name]").forEach(cursorOf);

  // ---- groups ---------------------------------------------------------------------------------------------------
  const SHADES = 8;
  const NUMBERS = {
    logprob: { label: "log probability (sampler)", level: (v) => Math.sqrt(-v / 6), say: "The stronger the shade, the less likely the sampler thought the token: none where it was certain, the strongest at a log probability of \u22126 or below (1 in 400)." },
    trainer_logprob: { label: "log probability (trainer)", level: (v) => Math.sqrt(-v / 6), say: "The stronger the shade, the less likely the trainer thought the token: none where it was certain, the strongest at a log probability of \u22126 or below (1 in 400)." },
    ratio: { label: "importance ratio", level: (v) => Math.abs(Math.log(v)) / 0.4, middle: 1, say: "The stronger the shade, the further from 1; the strongest by half or more. Underlined: over 1. Dotted: under 1. From the last optimizer step that saw the answer." },
    weight: { label: "correction weight", level: (v) => (v > 0 ? Math.abs(Math.log(v)) / 0.7 : 1), middle: 1, say: "The stronger the shade, the further from 1; the strongest by a factor of two or more, or masked (0). Underlined: over 1. Dotted: under 1." },
    entropy: { label: "entropy", level: (v) => v / 3, say: "The stronger the shade, the less sure the policy was of what comes next, from 0 to 3 nats and over." },
    advantage: { label: "advantage (whole answer)", middle: 0, say: "The stronger the shade, the larger the answer's advantage beside the others of its group. Underlined: positive, made likelier. Dotted: negative, made less likely." },
    none: { label: "nothing", say: "No shading." },
  };
  const state = { iteration: null, group: null, completion: null, shade: "logprob", values: false, plain: false };
  const available = Object.keys(page.shown).map(Number).sort((a, b) => a - b);
  const cache = new Map();

  function groupsOf(iteration) {
    if (!cache.has(iteration)) {
      const block = byId("groups-" + iteration);
      cache.set(iteration, block ? JSON.parse(block.textContent) : []);
    }
    return cache.get(iteration);
  }

  function question(group) {
    const last = (group.messages || []).at(-1);
    const text = last?.content ?? group.group_id;
    return visible(text.length > 110 ? text.slice(0, 109) + "\u2026" : text).replace(/\s+/g, " ");
  }

  function drawList() {
    const groups = groupsOf(state.iteration);
    const head = el("tr", {}, el("th", { scope: "col" }, "prompt"), el("th", { scope: "col" }, "shown because"),
      el("th", { scope: "col", class: "number" }, "mean"), el("th", { scope: "col", class: "number" }, "std"),
      ...["members", "cut", "failed"].map((name) => el("th", { scope: "col", class: "number wide" }, name)));
    const rows = groups.map((group) => {
      const pick = el("button", { type: "button", class: "pick" }, question(group));
      pick.addEventListener("click", () => go(state.iteration, group.group_id));
      return el("tr", { "aria-current": group.group_id === state.group ? "true" : null }, el("td", {}, pick),
        el("td", {}, group.reason), el("td", { class: "number" }, num(group.mean, 3)), el("td", { class: "number" }, num(group.std, 3)),
        el("td", { class: "number wide" }, String(group.num_members)), el("td", { class: "number wide" }, String(group.num_cut)),
        el("td", { class: "number wide" }, String(group.num_failed)));
    });
    const table = el("table", { class: "list" }, el("thead", {}, head), el("tbody", {}, rows));
    const total = page.shown[state.iteration];
    const caption = el("p", { class: "where" }, groups.length + " groups of iteration " + state.iteration + " are on the page.");
    byId("list").replaceChildren(total ? caption : "", el("div", { class: "scroll" }, table));
  }

  function drawGroup() {
    const article = byId("group");
    const group = groupsOf(state.iteration).find((g) => g.group_id === state.group);
    if (!group) {
      article.replaceChildren(el("p", {}, "Group " + state.group + " of iteration " + state.iteration +
        " is not on this page: see `grpo show` on the run."));
      return;
    }
    const facts = ["rewards: mean " + num(group.mean) + ", std " + num(group.std)];
    if (group.task) facts.push("task " + group.task);
    if (group.members.length < group.num_members) facts.push(group.members.length + " of " + group.num_members + " members shown, the best and the worst");
    const prompt = group.messages
      ? el("div", { class: "prompt" }, group.messages.map((m) => [el("div", { class: "role" }, m.role ?? "no role"), el("div", { class: "text" }, m.content ?? "no text is stored")]),
        el("div", { class: "role" }, "reference answer"), el("div", { class: "text" }, group.reference === null || group.reference === undefined ? "none is known" : group.reference))
      : el("p", { class: "where" }, "The prompt is not stored in this run.");
    const widest = Math.max(...group.members.map((m) => Math.abs(m.advantage) || 0), 1e-9);
    article.replaceChildren(el("h3", {}, "Group " + group.group_id + " of iteration " + state.iteration),
      el("p", { class: "where" }, facts.join(" \u00b7 ")), prompt,
      el("div", { class: "members" }, group.members.map((m) => memberOf(group, m, widest))));
  }

  function memberOf(group, member, widest) {
    const sign = member.advantage > 0 ? " good" : member.advantage < 0 ? " bad" : "";
    const named = member.completion_id === state.completion;
    const card = el("section", { class: "member" + sign + (named ? " named" : ""), "data-completion": member.completion_id, tabindex: "-1", "aria-label": "answer " + (member.index ?? member.completion_id) },
      el("h4", {}, member.index === undefined ? null : el("span", { class: "id" }, "#" + member.index), "reward " + num(member.reward, 3) + ", advantage " + signed(member.advantage)));
    if (member.num_tokens === undefined && member.text === undefined) {
      card.append(el("p", { class: "where" }, "The answer is not stored in this run."));
    } else if (state.plain || !member.tokens) {
      card.append(el("div", { class: "text tokens" }, member.text ?? ""));
    } else card.append(...tokensOf(group, member, widest));
    const parts = member.parts.map((part) => el("tr", {}, el("th", { scope: "row" }, part.name),
      el("td", { class: part.error ? "failed" : null }, part.reward === null ? "no score" : num(part.reward, 3)),
      el("td", {}, part.error ? el("span", { class: "failed text" }, part.error) : null, part.detail ? detailOf(part.detail) : null)));
    if (parts.length) card.append(el("table", {}, el("thead", {}, el("tr", {}, ["reward", "score", "detail"].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, parts)));
    const facts = [
      ["policy", member.policy === undefined ? undefined : member.policy + " " + (member.policy_digest || "")],
      ["updates behind", member.age], ["ended by", member.finish], ["tokens", member.num_tokens],
      ["log probability", member.logprob_sum],
      [member.dropped ? "left out" : "trained in step", member.dropped || (member.optimizer_steps || []).join(", ") || undefined],
      ["importance ratio, mean", member.ratio_mean], ["importance ratio, max", member.ratio_max],
      ["correction weight, mean", member.weight_mean], ["entropy, mean", member.entropy_mean], ["KL to the sampler", member.kl],
      ["tokens clipped", member.clipped], ["tokens masked", member.masked],
    ].filter(([, value]) => value !== undefined && value !== null);
    card.append(el("dl", {}, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, typeof value === "number" ? num(value, 3) : String(value))))));
    return card;
  }

  function detailOf(text) {
    return el("details", {}, el("summary", {}, "what it saw"), el("div", { class: "text" }, text));
  }

  function tokensOf(group, member, widest) {
    const numbers = state.shade === "advantage" ? member.tokens.map(() => member.advantage) : member[state.shade] || [];
    const kind = NUMBERS[state.shade];
    const head = member.tokens.length - (member.tokens_left_out ? page.tail_tokens : 0);
    const spans = member.tokens.map((piece, i) => {
      const value = numbers[i];
      const trains = !member.loss_mask || member.loss_mask[i];
      const classes = ["t"];
      if (typeof value === "number") {
        const level = state.shade === "advantage" ? Math.abs(value) / widest : kind.level(value);
        classes.push("s" + Math.max(0, Math.min(SHADES - 1, Math.floor(level * SHADES))));
        if (kind.middle !== undefined && Math.abs(value - kind.middle) > 1e-3) classes.push(value > kind.middle ? "high" : "low");
      }
      if (!trains) classes.push("out");
      const text = group.pieces[piece].replace(/\n/g, "\u23ce\n") || "\u25ab";
      const said = tokenFacts(member, i);
      return el("span", { class: classes.join(" "), title: said, "data-value": typeof value === "number" ? value.toFixed(2).replace("-", "\u2212") : value ?? null }, text);
    });
    if (member.tokens_left_out) spans.splice(head, 0, el("span", { class: "where" }, " [" + member.tokens_left_out + " tokens left out] "));
    const box = el("div", { class: "text tokens" + (state.values ? " with-values" : ""), tabindex: "0", role: "group", "aria-label": "tokens of answer " + (member.index ?? "") + ": left and right arrows read them" }, spans);
    const readout = el("p", { class: "token-readout", "aria-live": "polite" });
    const tokens = spans.filter((span) => span.classList.contains("t"));
    let at = -1;
    box.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      event.preventDefault();
      if (at >= 0) tokens[at].classList.remove("at");
      at = Math.max(0, Math.min(tokens.length - 1, at + (event.key === "ArrowRight" ? 1 : -1)));
      tokens[at].classList.add("at");
      tokens[at].scrollIntoView({ block: "nearest" });
      readout.textContent = tokens[at].title;
    });
    box.addEventListener("pointerover", (event) => { if (event.target.title) readout.textContent = event.target.title; });
    return [box, readout];
  }

  function tokenFacts(member, i) {
    const facts = ["token id " + member.token_ids[i]];
    for (const [name, kind] of Object.entries(NUMBERS)) {
      if (Array.isArray(member[name])) facts.push(kind.label + " " + num(member[name][i], 3));
    }
    if (typeof member.logprob?.[i] === "number") facts.push("probability " + num(Math.exp(member.logprob[i]), 3));
    if (member.loss_mask && !member.loss_mask[i]) facts.push("does not train");
    return facts.join(", ");
  }

  function drawLegend() {
    const kind = NUMBERS[state.shade];
    const ramp = state.shade === "none" ? [] : [...Array(SHADES).keys()].map((i) => el("span", { class: "swatch s" + i, "aria-hidden": "true" }));
    byId("legend").replaceChildren(...ramp, " " + kind.say);
  }

  function drawShades() {
    const first = groupsOf(state.iteration).flatMap((g) => g.members);
    const names = Object.keys(NUMBERS).filter((name) => name === "none" || name === "advantage" || first.some((m) => Array.isArray(m[name])));
    if (!names.includes(state.shade)) state.shade = names[0];
    byId("shade").replaceChildren(...names.map((name) => el("option", { value: name, selected: name === state.shade }, NUMBERS[name].label)));
  }

  function draw() {
    const at = available.indexOf(state.iteration);
    byId("iteration").value = String(state.iteration);
    byId("previous").disabled = at <= 0;
    byId("next").disabled = at < 0 || at >= available.length - 1;
    drawShades();
    drawLegend();
    drawList();
    drawGroup();
  }

  function go(iteration, group, completion) {
    const near = available.reduce((best, k) => (Math.abs(k - iteration) < Math.abs(best - iteration) ? k : best), available[0]);
    if (near === undefined) return;
    const place = ["#group", group ? iteration : near, group || groupsOf(near)[0].group_id, completion].filter((part) => part !== undefined && part !== null);
    const hash = place.map((part, i) => (i ? encodeURIComponent(part) : part)).join("/");
    if (location.hash === hash) follow();
    else location.hash = hash;
  }

  function follow() {
    const [name, iteration, group, completion] = location.hash.split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
    if (name !== "#group") return;
    const isSame = state.iteration === Number(iteration);
    Object.assign(state, { iteration: Number(iteration), group, completion: completion || null });
    draw();
    const card = [...byId("group").querySelectorAll(".member")].find((m) => m.dataset.completion === completion);
    const target = card || (isSame ? byId("group") : byId("groups"));
    if (card || !byId("browser").contains(document.activeElement)) {
      target.scrollIntoView();
      (card || byId("group")).focus({ preventScroll: true });
    }
  }

  if (available.length) {
    byId("browser").hidden = false;
    byId("iteration").append(...available.map((k) => el("option", { value: k }, k + " (" + page.shown[k] + ")")));
    byId("iteration").addEventListener("change", (event) => go(Number(event.target.value)));
    byId("previous").addEventListener("click", () => go(available[available.indexOf(state.iteration) - 1]));
    byId("next").addEventListener("click", () => go(available[available.indexOf(state.iteration) + 1]));
    byId("shade").addEventListener("change", (event) => { state.shade = event.target.value; drawLegend(); drawGroup(); });
    byId("values").addEventListener("change", (event) => { state.values = event.target.checked; drawGroup(); });
    byId("plain").addEventListener("change", (event) => { state.plain = event.target.checked; drawGroup(); });
    window.addEventListener("hashchange", follow);
    state.iteration = available.at(-1);
    state.group = groupsOf(state.iteration)[0].group_id;
    draw();
    follow();
  }
})();
