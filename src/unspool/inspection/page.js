"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("detail");
  const text = (i) => data.texts[i];
  const quoted = (s) => "“" + s.replaceAll("\n", "⏎") + "”";

  function percent(p) {
    if (p === null || p === undefined) return "–";
    if (p >= 0.9995) return "100%";
    if (p === 0) return "0%";
    return p >= 1e-4 ? Number((100 * p).toPrecision(3)) + "%" : "< 0.01%";
  }

  function make(tag, words, kind) {
    const made = document.createElement(tag);
    if (words !== undefined) made.textContent = words;
    if (kind) made.className = kind;
    return made;
  }

  function list(facts) {
    const made = make("dl");
    for (const [name, value] of facts) made.append(make("dt", name), make("dd", value));
    return made;
  }

  function table(others, name, p) {
    const made = make("table"), head = make("tr"), own = others.some((other) => other[2] !== null);
    made.append(make("caption", "the likeliest tokens"));
    head.append(make("th", "token"), make("th", "probability"));
    if (own) head.append(make("th", "model's own"));
    made.append(head);
    for (const [i, chance, raw] of others) {
      const line = make("tr", undefined, chance === 0 ? "masked" : i === name && chance === p ? "me" : "");
      const cell = make("td", quoted(text(i)));
      cell.style.setProperty("--w", 100 * chance + "%");
      line.append(cell, make("td", chance === 0 ? "masked" : percent(chance)));
      if (own) line.append(make("td", percent(raw)));
      made.append(line);
    }
    return made;
  }

  function ofStep(row, place) {
    const [name, id, p, own, rank, allowed, drafted, others, refused] = data.rows[row][place];
    const facts = [["token", `${id}, number ${place + 1} of output ${row + 1}`], ["probability", percent(p)]];
    if (own !== null) facts.push(["model's own", percent(own)]);
    if (rank !== null) facts.push(["rank", String(rank)]);
    if (allowed !== null) {
      const all = allowed === data.vocab;
      facts.push(["allowed", all ? "every token" : `${allowed.toLocaleString("en")} of ${data.vocab.toLocaleString("en")} tokens`]);
    }
    if (drafted) facts.push(["draft", "drafted, and accepted"]);
    if (refused.length) facts.push(["refused", quoted(refused.map(text).join("")) + " was drafted here"]);
    return [make("h3", quoted(text(name))), list(facts), ...(others.length ? [table(others, name, p)] : [])];
  }

  function ofNode(tree, place) {
    const [name, step, p, total, fate, until, outputs] = data.trees[tree][place];
    const fates = { "went on": "went on", pruned: `no beam went on from it in step ${until + 1}`, left: "still ran when the search ended" };
    const facts = [["step", String(step)], ["probability", percent(p)]];
    if (total !== null) facts.push(["sum of scores", String(total)]);
    facts.push(["fate", fates[fate] ?? `end of output ${outputs.join(", ")}`]);
    return [make("h3", quoted(text(name))), list(facts)];
  }

  let shown = null;
  function show(item) {
    if (item === shown) return;
    shown?.classList.remove("on");
    item.classList.add("on");
    shown = item;
    const row = item.closest("[data-row]"), tree = item.closest("[data-tree]");
    panel.replaceChildren(...(row ? ofStep(+row.dataset.row, +item.dataset.i) : ofNode(+tree.dataset.tree, +item.dataset.n)));
  }

  function beside(items, now, key) {
    const at = items.indexOf(now);
    if (key === "ArrowRight") return items[at + 1];
    if (key === "ArrowLeft") return items[at - 1];
    if (key === "Home") return items[0];
    if (key === "End") return items.at(-1);
    const sign = key === "ArrowDown" ? 1 : key === "ArrowUp" ? -1 : 0;
    if (!sign) return undefined;
    const from = now.getBoundingClientRect(), middle = (from.left + from.right) / 2;
    let best, least = Infinity;
    for (const item of items) {
      const box = item.getBoundingClientRect(), down = sign * (box.top - from.top);
      if (down < 4) continue;
      const far = 50 * down + Math.abs((box.left + box.right) / 2 - middle);
      if (far < least) [best, least] = [item, far];
    }
    return best;
  }

  for (const group of document.querySelectorAll("[data-row],[data-tree]")) {
    const items = [...group.querySelectorAll(".t")];
    group.setAttribute("role", "listbox");
    items.forEach((item, i) => {
      item.setAttribute("role", "option");
      item.tabIndex = i ? -1 : 0;
      if (group.dataset.row) item.dataset.i = i;
    });
    group.addEventListener("mouseover", (event) => {
      const item = event.target.closest(".t");
      if (item && !group.contains(document.activeElement)) show(item);
    });
    group.addEventListener("click", (event) => event.target.closest(".t")?.focus());
    group.addEventListener("focusin", (event) => {
      const item = event.target.closest(".t");
      for (const other of group.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
      item.tabIndex = 0;
      show(item);
    });
    group.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return document.activeElement.blur();
      const next = beside(items, event.target, event.key);
      if (!next) return;
      event.preventDefault();
      next.focus();
    });
  }

  document.getElementById("refused")?.addEventListener("change", (event) => {
    document.body.classList.toggle("plain", !event.target.checked);
  });
})();
