// The viewer's page: walks through samples (`view`) and talks to its model through the widget protocol: get, set,
// save_changes, on, off, send. The gallery passes a small stand-in for the kernel. drawing.js stands before this file.

const FIELDS = { split: "split", prompt_kind: "prompt kind", num_lookalikes: "look-alikes", cause: "failure cause" };

function render({ model, el }) {
  const root = html("div", { class: "egm-viewer", tabindex: "0", "data-lm-suppress-shortcuts": "true" });
  const bar = html("div", { class: "egm-bar-top" }), tools = html("div", { class: "egm-tools" }), main = html("div", { class: "egm-main" });
  root.append(tools, bar, main);
  el.append(root);

  const set = (name, value) => { model.set(name, value); model.save_changes(); };
  const go = (place) => { const last = model.get("count") - 1; set("index", Math.max(0, Math.min(last, place))); };
  const step = (by) => go(model.get("index") + by);
  const refine = (key, value) => set("filter", { ...model.get("filter"), [key]: value });
  const toggle = (name) => {
    const off = model.get("hidden");
    set("hidden", off.includes(name) ? off.filter((other) => other !== name) : [...off, name]);
  };
  const { light, revealBy, attach, revealAll, end } = pointing(main);

  // The bar with the sample's number is built once, so that the field one types into is never replaced.
  const place = html("input", { type: "number", min: 1, class: "egm-place", "aria-label": "go to number",
    onchange: () => go(Number(place.value) - 1), onkeydown: (event) => { if (event.key === "Enter") go(Number(place.value) - 1); } });
  const of = html("span", { class: "egm-of" });
  bar.append(html("button", { type: "button", class: "egm-step", title: "previous (left arrow)", "aria-label": "previous", onclick: () => step(-1) }, "‹"), place, of,
    html("button", { type: "button", class: "egm-step", title: "next (right arrow)", "aria-label": "next", onclick: () => step(1) }, "›"));
  let typing;
  const search = html("input", { type: "search", class: "egm-search", placeholder: "search in expressions", "aria-label": "search in expressions",
    oninput: () => { clearTimeout(typing); typing = setTimeout(() => refine("search", search.value), 250); } });

  function controls() {
    const choices = model.get("choices"), now = model.get("filter");
    if (!choices.show) { tools.remove(); return; }
    const some = (field) => choices[field] && choices[field].length > 1;
    const models = choices.models.map(({ model: name, label }) => [name, label]);
    const pair = models.length > 1;
    const nodes = [
      select("which samples", choices.show, now.show ?? "all", (value) => refine("show", value)),
      ...(pair ? [html("label", {}, "A ", select("model A", models, now.a ?? models[0][0], ([name]) => refine("a", name))),
        html("label", {}, "B ", select("model B", models, now.b ?? models[1][0], ([name]) => refine("b", name)))] : []),
      ...Object.entries(FIELDS).filter(([field]) => some(field)).map(([field, label]) =>
        select(label, [["any", `${label}: any`], ...choices[field].map((value) => [value, value])], now[field], ([value]) => refine(field, value))),
      html("label", {}, "sort ", select("sort", choices.sort, model.get("sort"), (value) => set("sort", value))),
    ];
    tools.replaceChildren(...nodes);
    if (document.activeElement !== search) search.value = now.search ?? "";
  }

  const save = html("span", { class: "egm-save" }, ...["png", "svg"].map((kind) =>
    html("button", { type: "button", title: `save what is seen as ${kind.toUpperCase()}`, onclick: () => model.send({ export: kind }) }, kind.toUpperCase())));
  if (model.get("choices").show) bar.append(search, save);

  let open = true, shownSample;
  function draw() {
    const view = model.get("view"), off = model.get("hidden"), count = model.get("count"), total = model.get("total");
    place.value = count ? model.get("index") + 1 : 0;
    place.max = count;
    of.textContent = `of ${count.toLocaleString("en")}${count === total ? "" : ` (all: ${total.toLocaleString("en")})`}`;
    if (!count || !view.models) { main.replaceChildren(html("p", { class: "egm-empty" }, "No sample matches the filter.")); return; }
    const shown = view.models.filter((m) => m.run && !off.includes(m.model));
    const stage = html("div", { class: "egm-stage" }, image(view, shown));
    if (view.error) stage.append(html("p", { class: "egm-error" }, view.error));
    stage.append(html("div", { class: "egm-legend" }, html("span", {}, swatch("#111", []), "ground truth"),
      ...(view.modal_box ? [html("span", {}, swatch("#111", [0.5, 0.8]), "visible part (hatched: hidden)")] : [])));
    const facts = [`${view.dataset ?? ""} ${view.split ?? ""}`.trim(), view.task === "amodal" ? "amodal" : null, view.prompt_kind,
      view.num_lookalikes === null || view.num_lookalikes === undefined ? null : `${view.num_lookalikes} look-alikes`, view.causes.cause, view.sample_id]
      .filter((fact) => fact !== null && fact !== undefined && fact !== ""); // 0 is an id
    const side = html("div", { class: "egm-side" }, html("h3", { class: "egm-expression" }, `“${view.expression ?? ""}”`),
      html("div", { class: "egm-facts" }, facts.join(" · ")), ...view.models.map((m, number) => card(m, number, { off: off.includes(m.model), toggle, light })));
    main.replaceChildren(stage, side);
    if (shownSample !== view.sample_id) { shownSample = view.sample_id; revealAll(); }
    attach(stage);
    if (view.group) {
      const tiles = group(view, open);
      tiles.addEventListener("toggle", () => { open = tiles.open; });
      main.append(tiles);
    }
  }

  root.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const models = model.get("view").models ?? [];
    const act = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => go(0), End: () => go(model.get("count") - 1), "/": () => search.focus(), ",": () => revealBy(-1), ".": () => revealBy(1) }[event.key]
      ?? (models[Number(event.key) - 1] && (() => toggle(models[Number(event.key) - 1].model)));
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });

  const download = (message, buffers) => {
    if (!message || !message.export) return;
    const type = { png: "image/png", svg: "image/svg+xml" }[message.export];
    const link = html("a", { href: URL.createObjectURL(new Blob([buffers[0]], { type })), download: message.name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const redraw = ["change:view", "change:hidden", "change:count", "change:index"], recontrol = ["change:choices", "change:filter", "change:sort"];
  redraw.forEach((name) => model.on(name, draw));
  recontrol.forEach((name) => model.on(name, controls));
  model.on("msg:custom", download);
  controls();
  draw();
  return () => {
    end();
    redraw.forEach((name) => model.off(name, draw));
    recontrol.forEach((name) => model.off(name, controls));
    model.off("msg:custom", download);
  };
}

export default { render };
