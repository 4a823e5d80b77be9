"use strict";
(() => {
  const all = (words) => [...document.querySelectorAll(words)];
  const one = (id) => document.getElementById(id);
  const controls = all(".controls input");
  const kept = "report " + location.pathname;

  const said = (id, what, parts) => {
    if (!one(id)) return;
    const shown = parts.filter((part) => !part.closest("[hidden]")).length;
    one(id).textContent = `${shown} of ${parts.length} ${what} shown`;
  };

  const number = (id, otherwise) => {
    const input = one(id);
    return input && input.value !== "" && !Number.isNaN(input.valueAsNumber) ? input.valueAsNumber : otherwise;
  };

  const chooseRuns = () => {
    for (const box of all("[data-shows]")) {
      const at = box.dataset.shows;
      const lines = `svg [id$="-series${at}"], svg [id$="-use${at}"]`;
      for (const part of all(`[data-run="${at}"], ${lines}`)) part.toggleAttribute("hidden", !box.checked);
    }
  };

  const choosePictures = () => {
    const text = (one("text")?.value ?? "").trim().toLowerCase();
    const images = number("images", 0), low = number("purest", 0), high = number("impurest", 100);
    for (const strip of all(".strip")) {
      const { images: size, purity } = strip.dataset;
      const fits = strip.textContent.toLowerCase().includes(text) && (size === undefined || Number(size) >= images);
      strip.hidden = !fits || (purity !== undefined && !(Number(purity) >= low && Number(purity) <= high));
    }
    for (const part of all(".part:has(.strip)")) {
      part.classList.toggle("empty", !part.querySelector(".strip:not([hidden])"));
    }
  };

  const update = () => {
    chooseRuns();
    choosePictures();
    for (const box of all("[data-curve]")) one("figure-" + box.dataset.curve).hidden = !box.checked;
    said("runs-shown", "runs", all("#verdict ~ [data-run]"));
    said("pictures-shown", "pictures", all(".strip"));
    said("curves-shown", "curves", all(".charts > figure"));
    const state = controls.map((input) => (input.type === "checkbox" ? input.checked : input.value));
    try { sessionStorage.setItem(kept, JSON.stringify(state)); } catch { /* where nothing may be kept */ }
  };

  const restore = () => {
    try {
      const state = JSON.parse(sessionStorage.getItem(kept) ?? "[]");
      if (state.length !== controls.length) return;
      controls.forEach((input, at) => {
        if (input.type === "checkbox") input.checked = state[at];
        else input.value = state[at];
      });
    } catch { /* then all is shown */ }
  };

  const value = (row, at) => {
    const text = row.cells[at]?.textContent.trim() ?? "";
    return text !== "" && !Number.isNaN(Number.parseFloat(text)) ? Number.parseFloat(text) : text;
  };

  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  };

  const sortBy = (head, at) => {
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [value(row, at), row]);
    rows.sort(([a], [b]) => (a === "" || b === "" || up ? compare(a, b) : compare(b, a)));
    body.append(...rows.map(([, row]) => row));
  };

  for (const head of all(".sortable thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(head, head.cellIndex));
    head.append(button);
  }

  for (const form of all(".controls")) {
    form.hidden = false;
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(update));
  }

  const seconds = Number(document.body.dataset.seconds ?? 0);
  const busy = () => !one("again").checked || document.activeElement?.matches("input:not([type=checkbox])");
  if (seconds) setInterval(() => { if (!busy()) location.reload(); }, 1000 * seconds);

  addEventListener("beforeprint", () => all("details").forEach((part) => (part.open = true)));
  restore();
  update();
})();
