// The playground's page: an image, a question, models that answer it. drawing.js stands before this file.
// Everything that is asked for goes to egm_lib/viewer/playground.py as one message; what comes back are traits.

function render({ model, el }) {
  const root = html("div", { class: "egm-viewer egm-playground", tabindex: "0", "data-lm-suppress-shortcuts": "true" });
  const source = html("div", { class: "egm-bar-top" }), asking = html("div", { class: "egm-bar-top" });
  const problem = html("p", { class: "egm-error", role: "alert" }), main = html("div", { class: "egm-main" });
  root.append(source, asking, problem, main);
  el.append(root);
  const { light, revealBy, attach, revealAll, end } = pointing(main);
  const off = new Set(), drafts = new Map(); // answers whose box is hidden; reasoning that is being edited
  const send = (message, buffers) => model.send(message, undefined, buffers);
  const button = (text, title, onclick) => html("button", { type: "button", title, onclick }, text);

  // The image: a sample, or a file of one's own.
  const { samples, models } = model.get("choices");
  const place = html("input", { type: "number", min: 1, max: samples, class: "egm-place", "aria-label": "sample", onchange: () => sample(Number(place.value) - 1) });
  const sample = (number) => { if (samples) send({ do: "sample", number: Math.max(0, Math.min(samples - 1, number)) }); };
  const here = () => model.get("view").number ?? -1;
  const file = html("input", { type: "file", accept: "image/*", class: "egm-file", "aria-label": "open an image",
    onchange: async () => { const [chosen] = file.files; if (chosen) send({ do: "open", name: chosen.name }, [await chosen.arrayBuffer()]); file.value = ""; } });
  const walking = samples ? [button("‹", "previous sample", () => sample(here() - 1)), place, html("span", { class: "egm-of" }, `of ${samples}`), button("›", "next sample", () => sample(here() + 1))] : [];
  source.append(...walking, html("label", {}, "or an image of your own ", file));

  // The question.
  const words = html("input", { type: "text", class: "egm-search", placeholder: "what is to be found", "aria-label": "expression", value: model.get("expression"),
    onkeydown: (event) => { if (event.key === "Enter") ask(true); } });
  const boxes = models.map(({ model: name, label }) => {
    const box = html("input", { type: "checkbox", value: name });
    box.checked = model.get("chosen").includes(name);
    return [box, html("label", {}, box, ` ${label}`)];
  });
  const ask = (reasoning) => {
    revealAll();
    send({ do: "ask", expression: words.value, reasoning, models: boxes.map(([box]) => box).filter((box) => box.checked).map((box) => box.value) });
  };
  const plain = button("ask", "ask the chosen models (Enter)", () => ask(true));
  const without = button("ask without reasoning", "the same question, with reasoning switched off", () => ask(false));
  const stop = button("stop", "end the answer that is being written", () => send({ do: "stop" }));
  asking.append(words, plain, without, stop, ...boxes.map(([, label]) => label));

  // Objects of a scene can be dragged, or moved with the arrow keys. A mark may lie above an object: what counts is
  // whose box the pointer is in.
  function things(drawing) {
    const objects = model.get("view").objects, nodes = objects.map(({ name, box: xyxy }, number) => {
      const node = svg("rect", { ...rectOf(xyxy), class: "egm-thing", tabindex: "0", "aria-label": `${name}: drag it, or move it with the arrow keys`, "data-number": number },
        svg("title", {}, `${name}: drag it`));
      node.addEventListener("keydown", (event) => {
        const by_px = { ArrowLeft: [-4, 0], ArrowRight: [4, 0], ArrowUp: [0, -4], ArrowDown: [0, 4] }[event.key];
        if (!by_px || model.get("busy")) return;
        event.preventDefault();
        event.stopPropagation();
        send({ do: "move", number, by_px });
      });
      return node;
    });
    let from = null, dragged = -1;
    const at = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    const by = (event) => { const to = at(event); return [to.x - from.x, to.y - from.y]; };
    drawing.addEventListener("pointerdown", (event) => {
      const point = at(event);
      dragged = objects.findLastIndex(({ box: [x1, y1, x2, y2] }) => x1 <= point.x && point.x <= x2 && y1 <= point.y && point.y <= y2);
      if (dragged < 0 || model.get("busy")) return;
      event.preventDefault();
      from = point;
      drawing.setPointerCapture(event.pointerId);
    });
    drawing.addEventListener("pointermove", (event) => { if (from) nodes[dragged].setAttribute("transform", `translate(${by(event).join(" ")})`); });
    drawing.addEventListener("pointerup", (event) => {
      if (!from) return;
      const by_px = by(event);
      from = null;
      if (Math.hypot(...by_px) >= 1) send({ do: "move", number: dragged, by_px });
      else nodes[dragged].removeAttribute("transform");
    });
    drawing.addEventListener("pointercancel", () => { if (from) { from = null; nodes[dragged].removeAttribute("transform"); } });
    return nodes;
  }

  // Under a finished answer: its reasoning to edit, and to go on from.
  function editing(m) {
    const going = html("div", { class: "egm-edit" });
    const close = () => { drafts.delete(m.model); draw(); };
    if (!drafts.has(m.model)) {
      const open = () => { drafts.set(m.model, m.reasoning.map(([text]) => text).join("")); draw(); main.querySelector(".egm-edit textarea")?.focus(); };
      going.append(button(m.reasoning.length ? "edit the reasoning" : "write a reasoning", "change it, and let the model go on from there", open));
      return going;
    }
    const text = html("textarea", { rows: 4, "aria-label": `reasoning of ${m.label}`, oninput: () => drafts.set(m.model, text.value) });
    text.value = drafts.get(m.model);
    const go = () => { const reasoning = text.value; drafts.delete(m.model); send({ do: "go on", model: m.model, reasoning }); };
    going.append(text, button("go on from here", "the model continues this reasoning, then answers", go), button("leave it", "forget the change", close));
    return going;
  }

  function draw() {
    const view = model.get("view"), answers = model.get("answers"), busy = model.get("busy");
    for (const node of [plain, without, file, place]) node.disabled = busy;
    stop.disabled = !busy;
    root.classList.toggle("egm-busy", busy);
    problem.textContent = model.get("problem");
    place.value = here() + 1 || "";
    if (!view.width) { main.replaceChildren(html("p", { class: "egm-empty" }, "No image yet: open one.")); return; }
    const held = document.activeElement?.closest?.(".egm-thing")?.dataset.number;
    const typing = document.activeElement?.closest?.(".egm-edit textarea"), at = typing && [typing.getAttribute("aria-label"), typing.selectionStart];
    const drawing = image(view, answers.filter((m) => !off.has(m.model)));
    const shown = main.querySelector(".egm-stage image"), fresh = drawing.querySelector("image");
    fresh.after(...things(drawing));
    if (shown && shown.getAttribute("href") === fresh.getAttribute("href")) fresh.replaceWith(shown); // it need not be decoded again
    const stage = html("div", { class: "egm-stage" }, drawing, html("div", { class: "egm-legend" }, html("span", {}, view.name),
      view.gt_box ? html("span", {}, swatch("#111", []), "ground truth") : html("span", {}, "what is right is not known here"),
      ...(view.objects.length ? [html("span", {}, "drag the objects")] : [])));
    const toggle = (name) => { off.has(name) ? off.delete(name) : off.add(name); draw(); };
    const side = html("div", { class: "egm-side" }, ...(answers.length ? [] : [html("p", { class: "egm-empty" }, "Type what is to be found, and ask.")]),
      ...answers.map((m, number) => {
        const node = card(m, number, { off: off.has(m.model), toggle, light });
        if (!busy && m.status !== "error") node.append(editing(m));
        return node;
      }));
    main.replaceChildren(stage, side);
    attach(stage);
    if (at) { const again = main.querySelector(`textarea[aria-label="${CSS.escape(at[0])}"]`); again?.focus(); again?.setSelectionRange(at[1], at[1]); }
    if (held) main.querySelector(`.egm-thing[data-number="${held}"]`)?.focus();
  }

  root.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { ",": () => revealBy(-1), ".": () => revealBy(1), "/": () => words.focus() }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });

  let due = false; // a message may change several traits: they are drawn once
  const later = () => { if (!due) { due = true; queueMicrotask(() => { due = false; draw(); }); } };
  const redraw = ["change:view", "change:answers", "change:busy", "change:problem"];
  const rename = () => { if (document.activeElement !== words) words.value = model.get("expression"); };
  const renewed = () => { drafts.clear(); off.clear(); revealAll(); };
  model.on("change:view", renewed);
  redraw.forEach((name) => model.on(name, later));
  model.on("change:expression", rename);
  draw();
  return () => {
    end();
    model.off("change:view", renewed);
    redraw.forEach((name) => model.off(name, later));
    model.off("change:expression", rename);
  };
}

export default { render };
