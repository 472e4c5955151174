"use strict";
// Draws the charts, tables and texts of the report from the data that the page carries.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const views = new Map();
  let layer = data.start;

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "style") for (const [key, item] of Object.entries(value)) node.style.setProperty(key, item);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const percent = (share) => (share >= 0.0995 ? Math.round(100 * share) : (100 * share).toFixed(1)) + "%";

  // ---- charts

  const rowsOf = (panel) => {
    const columns = panel.columns[panel.layered ? layer : ""];
    if (!columns) return [];
    const names = Object.keys(columns);
    return columns[names[0]].map((_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])));
  };

  const draw = async () => {
    for (const [id, panel] of Object.entries(data.panels)) {
      const spec = { ...panel.spec, data: { name: "rows", values: rowsOf(panel) } };
      const result = await vegaEmbed("#" + CSS.escape(id), spec, {
        actions: false, renderer: "svg", tooltip: { disableDefaultStyle: true },
      });
      views.set(id, result.view);
    }
  };

  const redraw = async () => {
    for (const [id, view] of views) {
      const panel = data.panels[id];
      if (!panel.layered) continue;
      const rows = rowsOf(panel);
      document.getElementById(id).parentElement.hidden = rows.length === 0;
      await view.data("rows", rows).runAsync();
    }
  };

  // ---- experts

  // An expert's colour is its place in the order of the map of domains.
  const place = (run, expert) => data.runs[run].order[layer].indexOf(expert);
  const colour = (run, expert) => {
    const at = place(run, expert);
    return { "--hue": (360 * at) / data.runs[run].experts + 20, "--odd": at % 2 };
  };
  const expertNumber = (run, expert) => make("span", {
    class: "expert-number",
    style: {
      ...colour(run, expert),
      background: "oklch(calc(var(--token-lightness) + var(--odd) * var(--token-step)) var(--token-chroma) var(--hue))",
    },
  }, String(expert));

  const expertTable = (run, index) => {
    const found = run.experts_of[layer];
    if (!found) return make("p", { class: "missing" }, `${run.name} has no layer ${layer}.`);
    const most = Math.max(...found.load);
    const body = make("tbody");
    for (const expert of run.order[layer]) {
      const load = found.load[expert];
      const tokens = found.tokens[expert].map(([token, share]) =>
        make("span", { class: "token" }, token, " ", make("small", {}, percent(share))));
      const domains = found.domains[expert].map(([domain, share], rank) =>
        make("span", {}, (rank ? ", " : "") + domain + " ", make("span", { class: "of" }, percent(share))));
      body.append(make("tr", {},
        make("th", { scope: "row" }, expertNumber(index, expert)),
        make("td", { class: "load" }, make("span", { class: "bar", style: { width: `${(4.5 * load) / most}em` } }), load.toFixed(2)),
        make("td", {}, ...(load ? domains : ["dead: no token selects it"])),
        make("td", {}, ...tokens)));
    }
    const head = make("tr", {}, ...["Expert", "Load", "Domains", "Tokens"].map((name) => make("th", { scope: "col" }, name)));
    return make("details", { class: run.experts > 32 ? "expert-table long" : "expert-table", ...(index === 0 || data.runs.length <= 2 ? { open: "" } : {}) },
      make("summary", {}, run.name),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Experts of ${run.name}` },
        make("table", {}, make("thead", {}, head), body)));
  };

  const drawExperts = () => {
    const folder = document.getElementById("expert-tables");
    const open = [...folder.children].map((table) => table.open);
    folder.replaceChildren(...data.runs.map(expertTable));
    [...folder.children].forEach((table, index) => { if (index in open && "open" in table) table.open = open[index]; });
  };

  // ---- texts

  const tip = document.getElementById("tip");
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  for (const run of data.runs) {
    for (const text of run.texts) {
      const low = bytes(text.experts);
      text.experts = Uint16Array.from({ length: low.length / 2 }, (_, at) => low[2 * at] + 256 * low[2 * at + 1]);
      text.weights = bytes(text.weights);
    }
  }

  const textBox = (run, index, text) => {
    const shown = run.text_layers.indexOf(layer);
    const heading = make("h4", {}, data.runs.length > 1 ? `${run.name}: ${text.domain}` : text.domain);
    if (shown < 0) return make("div", { class: "text" }, heading, `No layer ${layer} here.`);
    const stride = run.text_layers.length * run.chosen;
    const selected = (token) => Array.from({ length: run.chosen }, (_, k) => {
      const at = token * stride + shown * run.chosen + k;
      return [text.experts[at], text.weights[at] / 255];
    });
    const counts = new Map();
    const spans = text.pieces.map((piece, token) => {
      const [[expert]] = selected(token);
      counts.set(expert, (counts.get(expert) || 0) + 1);
      return make("span", {
        "data-token": token, "data-expert": expert, style: colour(index, expert), ...(piece ? {} : { class: "cut" }),
      }, piece);
    });
    const pieces = make("div", { class: "pieces" }, ...spans);
    const ranked = [...counts].sort((one, other) => other[1] - one[1]);
    const key = make("div", { class: "expert-key" }, "Top experts: ");
    ranked.slice(0, 8).forEach(([expert, count]) =>
      key.append(expertNumber(index, expert), ` ${percent(count / spans.length)}  `));
    if (ranked.length > 8) key.append(`and ${ranked.length - 8} more`);
    const box = make("div", {
      class: "text", tabindex: "0", role: "group",
      "aria-label": `Text of ${text.domain}, routed by ${run.name}: ${spans.length} tokens. Arrow keys go through them.`,
    }, heading, pieces, key);

    let current = -1;
    const show = (token) => {
      hide();
      current = token;
      const span = spans[token];
      const experts = selected(token);
      span.classList.add("current");
      if (document.getElementById("same-expert").checked)
        for (const other of spans) other.classList.toggle("same", other.dataset.expert === span.dataset.expert);
      let whole = token;
      while (whole > 0 && !text.pieces[whole]) whole -= 1;
      const name = token === whole ? `“${text.pieces[token]}”` : `a part of “${text.pieces[whole]}”`;
      tip.replaceChildren(make("b", {}, name), ...experts.map(([expert, weight]) =>
        make("div", {}, expertNumber(index, expert), ` expert ${expert}, weight ${percent(weight)}`)));
      tip.hidden = false;
      const place = span.getClientRects()[0] || span.getBoundingClientRect();
      const width = tip.offsetWidth, height = tip.offsetHeight;
      tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - width - 8))}px`;
      tip.style.top = `${place.bottom + height + 10 < innerHeight ? place.bottom + 6 : place.top - height - 6}px`;
    };
    const hide = () => {
      tip.hidden = true;
      for (const span of spans) span.classList.remove("current", "same");
    };
    pieces.addEventListener("pointerover", (event) => {
      const token = event.target.dataset.token;
      if (token !== undefined) show(Number(token));
    });
    pieces.addEventListener("pointerleave", hide);
    box.addEventListener("focus", () => { if (box.matches(":focus-visible")) show(Math.max(current, 0)); });
    box.addEventListener("blur", hide);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      show(Math.max(0, Math.min(spans.length - 1, current + step)));
      spans[current].scrollIntoView({ block: "nearest" });
    });
    return box;
  };

  const choice = document.getElementById("text-domain");
  const domains = [...new Set(data.runs.flatMap((run) => run.texts.map((text) => text.domain)))];
  choice.append(make("option", { value: "" }, "all domains"),
    ...domains.map((domain) => make("option", { value: domain }, domain)));
  // Of one run all texts fit side by side; of several, one text at a time can be compared.
  choice.value = data.runs.length > 1 ? domains[0] : "";

  const drawTexts = () => {
    tip.hidden = true;
    const boxes = (wanted) => data.runs.flatMap((run, index) =>
      run.texts.filter((text) => wanted.includes(text.domain)).map((text) => textBox(run, index, text)));
    const groups = choice.value ? [[choice.value]] : data.runs.length > 1 ? domains.map((domain) => [domain]) : [domains];
    document.getElementById("texts").replaceChildren(
      ...groups.map((wanted) => make("div", { class: "text-row" }, ...boxes(wanted))));
  };
  choice.addEventListener("change", drawTexts);
  document.getElementById("show-numbers").addEventListener("change", (event) =>
    document.getElementById("texts").classList.toggle("show-numbers", event.target.checked));

  // ---- the layer

  const nameLayer = () => {
    for (const place of document.querySelectorAll(".which-layer")) place.textContent = `layer ${layer}`;
  };
  // One change after the other: a quick hand must not leave charts of two layers.
  let last = Promise.resolve();
  const settle = (work) => {
    document.documentElement.dataset.state = "drawing";
    last = last.then(work).then(() => { document.documentElement.dataset.state = "drawn"; });
  };
  document.getElementById("layer-bar").addEventListener("change", (event) => {
    layer = Number(event.target.value);
    nameLayer();
    drawExperts();
    drawTexts();
    settle(redraw);
  });

  // What is folded is printed too.
  const folded = new Set();
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { folded.add(part); part.open = true; }
  });
  addEventListener("afterprint", () => { for (const part of folded) part.open = false; folded.clear(); });

  nameLayer();
  drawExperts();
  drawTexts();
  settle(draw);
})();
